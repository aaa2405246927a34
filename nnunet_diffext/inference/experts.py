"""What DMED-Seg's two experts say, whom the fusion trusts and how sure it is: the maps behind the paper's Table 4.

    maps = expert_maps(model_folder, ["case_0000.nii.gz"], fold=0, device="cuda")
    maps["weight_de"]   # fusion weight of the diffusion expert, per voxel of the preprocessed image
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.networks.dmed import DMEDNet


class ExpertMaps(nn.Module):
    """Wraps a :class:`DMEDNet` so that nnU-Net's sliding window averages all its maps at once.

    ``forward``: ``(B, C, *patch)`` -> ``(B, 3 K + 1, *patch)``: probabilities of the fused prediction, of the diffusion
    and of the convolutional expert, then the fusion weight of the diffusion expert at the finest scale (0.5 for the
    fixed average).

    Raises:
        ValueError: the network has one expert only.
    """

    def __init__(self, network: DMEDNet) -> None:
        super().__init__()
        if network.de is None or network.ce is None:
            raise ValueError("This model has a single expert (CEonly, DEonly): there is nothing to compare.")
        self.network = network
        self.channels = 3 * network.label_space.num_heads + 1

    def forward(self, image: Tensor) -> Tensor:
        """All maps of one patch, stacked as channels."""
        net = self.network
        out = net.segment(image, net.inference_noise(image))
        probabilities = [net.label_space.probabilities(x) for x in (out.fused, out.de, out.ce)]
        if out.weights:
            weight = interpolate(out.weights[0][:, :1], size=image.shape[2:], mode=net.mode)
        else:
            weight = torch.full_like(probabilities[0][:, :1], 0.5)
        return torch.cat([*probabilities, weight.float()], dim=1)


def expert_maps(
    model_folder: str | Path,
    image_files: Sequence[str],
    *,
    fold: int | str = 0,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    mirroring: bool = True,
) -> dict[str, Any]:
    """Maps of one case, with nnU-Net's preprocessing, sliding window and mirroring.

    Args:
        model_folder: ``<nnUNet_results>/<dataset>/DMEDSegTrainer...__<plans>__<configuration>``.
        image_files: the channels of one case, in order.
        fold: fold of the model.
        checkpoint: file name inside the fold's folder.
        device: ``"cuda"``, ``"cpu"`` or ``"mps"``.
        mirroring: average over mirrored passes, as ``nnUNetv2_predict`` does by default.

    Returns:
        NumPy arrays on the grid of the preprocessed image: ``image (C, *)``; probabilities ``fused``, ``de``, ``ce``
        ``(K, *)``; ``weight_de (*)``; ``confidence (*)``, one minus the normalised entropy of ``fused``; ``spacing`` in
        mm. And ``segmentation``, in the image's own geometry, with ``properties`` for nnU-Net's writers.
        Probabilities are averaged over tiles and mirrored passes, where ``nnUNetv2_predict`` averages logits: single
        voxels may differ.

    Raises:
        CheckpointError: no such checkpoint, or an unsafe one. ValueError: a model with one expert, or of another
        trainer.
        NotImplementedError: a cascade, whose second stage needs the first one's segmentation.
    """
    predictor, net = _load(Path(model_folder), fold, checkpoint, device, mirroring)
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    if configuration.previous_stage_name is not None:
        raise NotImplementedError("Expert maps of a cascade are not supported: its input holds a segmentation.")

    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(list(image_files), None, plans, configuration, predictor.dataset_json)
    labels = predictor.label_manager
    predictor.network = ExpertMaps(net)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=predictor.network.channels)
    maps = predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).float().cpu()

    fused, de, ce = maps[:-1].clamp(0, 1).chunk(3)
    logits = net.label_space.log_probabilities(fused[None])[0]
    segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, labels, properties
    )
    confidence = net.label_space.confidence(fused[None])[0, 0]
    arrays = {"fused": fused, "de": de, "ce": ce, "weight_de": maps[-1], "confidence": confidence}
    return {
        "image": np.asarray(data),
        **{name: value.numpy() for name, value in arrays.items()},
        "spacing": tuple(configuration.spacing),
        "segmentation": np.asarray(segmentation),
        "properties": properties,
    }


def _load(
    folder: Path, fold: int | str, checkpoint: str, device: str, mirroring: bool
) -> tuple[nnUNetPredictor, DMEDNet]:
    """nnU-Net's predictor for the model, and the network in it."""
    read_safely(folder / f"fold_{fold}" / checkpoint)  # nnU-Net's own reader would run what a malicious file holds
    predictor = nnUNetPredictor(
        use_mirroring=mirroring, perform_everything_on_device=device == "cuda",
        device=torch.device(device), allow_tqdm=False,
    )  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(folder), (fold,), checkpoint)
    net = getattr(predictor.network, "_orig_mod", predictor.network)  # nnUNet_compile wraps it
    if not isinstance(net, DMEDNet):
        raise ValueError(f"{folder} holds a {predictor.trainer_name}; expert maps exist for DMEDSegTrainer only.")
    return predictor, net
