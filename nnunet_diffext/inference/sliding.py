"""nnU-Net's sliding window for anything that a tile can give: float32, weighted by nnU-Net's Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.utilities.helpers import dummy_context, empty_cache
from torch import Tensor

Where = tuple[int | slice, ...]


class Tile(NamedTuple):
    """Image ``(1, C, *patch)`` on the network's device, its index into the padded ``(C, *volume)``, and its share
    ``(*patch)`` in the average of every voxel: shares of all tiles sum to 1, and are 0 in the padding."""

    image: Tensor
    where: Where
    share: Tensor


TileFunction = Callable[[Tile], tuple[Tensor, Tensor]]
"""Maps ``(channels, *patch)`` to average over tiles, and any tensor to sum over them (see ``Tile.share``)."""


def padded(data: Tensor, patch_size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """``(C, *volume)`` with zeros around it where it is smaller than a patch, and the index that takes them away."""
    return pad_nd_image(data, patch_size, "constant", {"value": 0}, True, None)


def tile_positions(volume: Sequence[int], patch_size: Sequence[int], step_size: float) -> Iterator[Where]:
    """Indices of all tiles into ``(C, *volume)``; a 2D patch goes through a volume plane by plane."""
    planes = len(volume) - len(patch_size)
    steps = compute_steps_for_sliding_window(tuple(volume[planes:]), tuple(patch_size), step_size)
    for plane in product(*map(range, volume[:planes])):
        for corner in product(*steps):
            yield (slice(None), *plane, *(slice(s, s + p) for s, p in zip(corner, patch_size, strict=True)))


@torch.inference_mode()
def average_over_tiles(
    predictor: nnUNetPredictor, data: Tensor, channels: int, function: TileFunction
) -> tuple[Tensor, Tensor]:
    """Run ``function`` on every tile of a preprocessed image.

    Args:
        predictor: initialised; its network is moved to its device and put into eval mode.
        data: ``(C, *volume)``.
        channels: of the maps.
        function: called once per tile, under autocast on CUDA, as nnU-Net does.

    Returns:
        Averaged maps ``(channels, *volume)`` and the summed totals, float32 on the CPU. If the maps do not fit onto the
        device, they are collected on the CPU.

    Raises:
        ValueError: the maps contain NaN or Inf.
    """
    device = predictor.device
    predictor.network = predictor.network.to(device).eval()
    patch = tuple(predictor.configuration_manager.patch_size)
    image, inside = padded(data.float(), patch)
    positions = list(tile_positions(image.shape[1:], patch, predictor.tile_step_size))
    on_device = predictor.perform_everything_on_device and device.type != "cpu"
    autocast = torch.autocast(device.type, enabled=True) if device.type == "cuda" else dummy_context()
    with autocast:
        try:
            maps, totals = _collect(image, inside, positions, patch, channels, function, device, on_device)
        except torch.OutOfMemoryError:
            if not on_device:
                raise
            print("The result does not fit onto the device; it is collected in main memory.")
            empty_cache(device)
            maps, totals = _collect(image, inside, positions, patch, channels, function, device, False)
    maps = maps[(slice(None), *inside[1:])].cpu()
    empty_cache(device)
    if not torch.isfinite(maps).all():
        raise ValueError("The network's output contains NaN or Inf: it diverged in training, or the image is unusual.")
    return maps, totals.cpu()


def _collect(
    image: Tensor,
    inside: tuple[slice, ...],
    positions: Sequence[Where],
    patch: tuple[int, ...],
    channels: int,
    function: TileFunction,
    device: torch.device,
    on_device: bool,
) -> tuple[Tensor, Tensor]:
    store = device if on_device else torch.device("cpu")
    image = image.to(store)
    # In half precision, where nnU-Net lifts the smallest weights to one value; only the sums are float32.
    gaussian = compute_gaussian(patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=store).float()
    weight = torch.zeros(image.shape[1:], device=store)
    for where in positions:
        weight[where[1:]] += gaussian
    share = torch.zeros_like(weight)
    share[inside[1:]] = 1 / weight[inside[1:]]
    del weight
    result = torch.zeros((channels, *image.shape[1:]), device=store)
    totals: Tensor | None = None
    for where in positions:
        part = gaussian * share[where[1:]]
        tile = Tile(image[where][None].to(device).contiguous(), where, part.to(device))
        maps, more = function(tile)
        result[where] += maps.float().to(store) * part
        totals = more if totals is None else totals + more
    return result, totals
