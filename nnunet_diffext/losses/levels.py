"""Losses at several resolutions: deep supervision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of logits ``(B, K, *)``, target ``(B, K, *)`` and weight ``(B, 1, *)``."""


def over_levels(loss: Loss, logits: Sequence[Tensor], target: Tensor, weight: Tensor) -> Tensor:
    """Mean of a loss over levels, weighted 1, 1/2, 1/4 ... and normalised, as in nnU-Net.

    Args:
        loss: of one level.
        logits: ``(B, K, *level)`` each, finest first.
        target: one-hot ``(B, K, *)``. Coarser levels are compared with the label frequencies of the voxels they cover.
        weight: ``(B, 1, *)``, non-negative; voxels of weight 0 belong to nothing.
    """
    total = target.new_zeros(())
    for level, out in enumerate(logits):
        total = total + 0.5**level * loss(out, *at_resolution(target, weight, out.shape[2:]))
    return total / sum(0.5**level for level in range(len(logits)))


def at_resolution(target: Tensor, weight: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Label frequencies ``(B, K, *size)`` among voxels with weight, and the mean weight ``(B, 1, *size)``."""
    if target.shape[2:] == tuple(size):
        return target, weight
    pool = adaptive_avg_pool3d if target.ndim == 5 else adaptive_avg_pool2d
    with torch.autocast(target.device.type, enabled=False):
        weight, counts = weight.float(), (weight > 0).float()
        return pool(target.float() * counts, size) / pool(counts, size).clamp_min(1e-5), pool(weight, size)
