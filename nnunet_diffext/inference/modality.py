"""The modality of the images that a trained M4oE model predicts, where the user knows it."""

from __future__ import annotations

from typing import Any

from nnunet_diffext.inference.model_folder import network_of

TRAINER = "M4oETrainer"


def set_modality(nnunet: Any, name: str) -> None:
    """Predict with the experts and the head of one modality, instead of those that the network tells.

    Args:
        nnunet: nnU-Net's predictor, with its model loaded.
        name: of a modality.
    Raises:
        ValueError: no M4oE model, or it does not know the modality, or was never trained on it.
    """
    network = network_of(nnunet)
    known = getattr(network, "modalities", None)
    if known is None or not hasattr(network, "modality"):
        raise ValueError(f"--modality: this model knows of no modalities; {TRAINER} trains one that does.")
    if name not in known:
        raise ValueError(f"--modality {name}: this model knows {', '.join(known)}.")
    index = known.index(name)
    folds = nnunet.list_of_parameters
    untaught = sum(not fold["active"][index] for fold in folds)
    if untaught:
        of = f" in {untaught} of {len(folds)} folds" if len(folds) > 1 else ""
        raise ValueError(
            f"--modality {name}: the model has an expert and a head for {name}, but was never trained on it{of}. If it "
            "is from nnunet_diffext add_modality, train it with the command that was printed, and predict with the "
            "model that this makes; otherwise there was no training case of that modality."
        )
    network.modality = index
