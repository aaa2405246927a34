"""Bidirectional copy-paste between two batches (Bai et al., CVPR 2023): a strong perturbation with a known target."""

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


def exchange(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``cat([a inside mask, b outside; b inside, a outside])`` along the batch: ``(2 B, *)`` from two ``(B, *)``."""
    mask = mask.to(a.dtype)
    return torch.cat([mask * a + (1 - mask) * b, mask * b + (1 - mask) * a])
