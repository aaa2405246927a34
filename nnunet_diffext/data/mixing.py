"""Copy-paste between two batches (Bai et al., CVPR 2023): a strong perturbation with a known target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_cuboid(batch: int, patch: Sequence[int], fraction: float, device: torch.device | None = None) -> Tensor:
    """Masks ``(batch, 1, *patch)`` that are 1 inside a randomly placed cuboid.

    Args:
        batch: number of masks, each with its own place.
        patch: spatial size in voxels.
        fraction: edge length of the cuboid relative to the patch, in (0, 1].
    """
    mask = torch.zeros(batch, 1, *patch, device=device)
    for sample in mask:
        window = [slice(None)]
        for size in patch:
            length = max(1, round(fraction * size))
            start = int(torch.randint(size - length + 1, ()))
            window.append(slice(start, start + length))
        sample[tuple(window)] = 1
    return mask


def invert_half(mask: Tensor) -> Tensor:
    """Invert every other mask of a batch, from the first or the second on: either image is as often the background."""
    inverted = mask.clone()
    chosen = slice(int(torch.randint(2, ())), None, 2)
    inverted[chosen] = 1 - mask[chosen]
    return inverted


def paste(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``a`` where ``mask`` is 1, ``b`` where it is 0; ``(B, *)`` all."""
    mask = mask.to(a.dtype)
    return mask * a + (1 - mask) * b
