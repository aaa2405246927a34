"""The modality of the images that a trained M4oE model predicts: the user's, or what the network tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nnunet_diffext.inference.model_folder import network_of
from nnunet_diffext.inference.sliding import padded, tile_positions

TRAINER = "M4oETrainer"
LEAST = math.log(0.01)
"""Of ``log P(m | tile)``: no single tile, and no fold that was never trained on a modality, decides alone."""


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


@contextmanager
def modality_of_image(nnunet: Any, image: Tensor) -> Iterator[None]:
    """Let an image have one modality in all tiles and folds: that with the highest sum of ``log P(m | tile)``, of which
    none is below :data:`LEAST`. A tile with next to nothing in it is easily mistaken. Networks that are given the
    modality, or tell none, are left alone.

    Args:
        nnunet: nnU-Net's predictor, with its model loaded.
        image: preprocessed, ``(C, *)``.
    """
    network = network_of(nnunet)
    told = _told(nnunet, network, image) if getattr(network, "modality", 0) is None else None
    if told is None:
        yield
        return
    network.modality = told
    try:
        yield
    finally:
        network.modality = None


@torch.inference_mode()
def _told(nnunet: Any, network: Any, image: Tensor) -> int | None:
    patch = tuple(nnunet.configuration_manager.patch_size)
    volume, _ = padded(image.float(), patch)
    network.to(nnunet.device)
    total: Tensor | float = 0.0
    for state in nnunet.list_of_parameters:
        if len(nnunet.list_of_parameters) > 1:
            network.load_state_dict(state)
        for where in tile_positions(volume.shape[1:], patch, 1.0):
            told = network.tell(volume[where][None].to(nnunet.device))
            if told is None:
                return None
            total = total + told.clamp_min(LEAST)
    return int(total.argmax())
