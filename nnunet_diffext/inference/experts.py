"""What DMED-Seg's two experts say, whom the fusion trusts and how sure it is: the maps behind the paper's Table 4.

maps = expert_maps(model_folder, ["case_0000.nii.gz"], fold=0, device="cuda")
maps["weight_de"]   # fusion weight of the diffusion expert, per voxel of the preprocessed image
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_diffext.files import FINAL
from nnunet_diffext.inference.grid import ModelPlans, preprocess, probabilities_to_original
from nnunet_diffext.inference.members import mirror_combinations
from nnunet_diffext.inference.model_folder import load_predictor, network_of
from nnunet_diffext.inference.sliding import Tile, average_over_tiles
from nnunet_diffext.networks.dmed import DMEDNet


class ExpertMaps:
    """All maps of a :class:`DMEDNet`, for the sliding window: ``3 K + 1`` channels.

    Probabilities of the fused prediction, of the diffusion and of the convolutional expert, then the fusion weight of
    the diffusion expert at the finest scale (0.5 for the fixed average), averaged over mirrored passes.

    Raises:
        ValueError: the network has one expert only.
    """

    def __init__(self, network: DMEDNet, mirrors: Sequence[tuple[int, ...]]) -> None:
        if network.de is None or network.ce is None:
            raise ValueError("This model has a single expert (CEonly, DEonly): there is nothing to compare.")
        self.network, self.mirrors = network, mirrors
        self.channels = 3 * network.label_space.num_heads + 1

    def __call__(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Maps of a tile; nothing to sum."""
        passes = [self._maps(tile.image.flip(axes)).flip(axes) for axes in self.mirrors]
        return (sum(passes) / len(passes))[0], torch.zeros(0)

    def _maps(self, image: Tensor) -> Tensor:
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
    checkpoint: str = FINAL,
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
    predictor = load_predictor(model_folder, (fold,), checkpoint=checkpoint, device=device, mirroring=mirroring)
    net = network_of(predictor)
    if not isinstance(net, DMEDNet):
        raise ValueError(f"{model_folder} holds a {predictor.trainer_name}; expert maps exist for DMEDSegTrainer only.")
    model = ModelPlans.of(predictor)
    if model.is_cascade:
        raise NotImplementedError("Expert maps of a cascade are not supported: its input holds a segmentation.")

    data, properties = preprocess(model, image_files)
    tiles = ExpertMaps(net, mirror_combinations(predictor.allowed_mirroring_axes if mirroring else None))
    maps, _ = average_over_tiles(predictor, torch.from_numpy(data), tiles.channels, tiles)
    fused, de, ce = maps[:-1].clamp(0, 1).chunk(3)
    confidence = net.label_space.confidence(fused[None])[0, 0]
    arrays = {"fused": fused, "de": de, "ce": ce, "weight_de": maps[-1], "confidence": confidence}
    return {
        "image": data,
        **{name: value.numpy() for name, value in arrays.items()},
        "spacing": tuple(model.configuration.spacing),
        "segmentation": probabilities_to_original(model, fused.numpy(), properties)[0],
        "properties": properties,
    }
