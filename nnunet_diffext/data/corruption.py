"""A prior made as wrong on training images as it is on new ones.

A network is nearly perfect on the cases it was trained on; a second stage that sees only such priors learns to trust
them. Without out-of-fold priors, the in-sample one is degraded here: its boundaries are displaced by a smooth random
field, and smooth random offsets of its logits make regions appear and vanish. One strength governs both, and is chosen
such that the error equals the one on validation images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

DISPLACEMENT, OFFSET = 6.0, 6.0
"""At strength 1: standard deviation of the displacement in voxels, and of the offset of the log-odds."""
SMOOTHNESS = 8
"""Voxels per node of the random fields."""


def smooth_noise(like: Tensor, channels: int, generator: torch.Generator | None = None) -> Tensor:
    """Random fields ``(B, channels, *)`` of about unit variance, smooth over :data:`SMOOTHNESS` voxels."""
    size = like.shape[2:]
    nodes = (len(like), channels, *(max(2, round(s / SMOOTHNESS) + 1) for s in size))
    coarse = torch.randn(nodes, generator=generator, device=like.device)
    mode = "trilinear" if len(size) == 3 else "bilinear"
    # linear interpolation halves the variance between nodes, per axis by a third on average
    return interpolate(coarse, size=size, mode=mode, align_corners=True) * 1.5 ** (len(size) / 2)


def corrupt(logits: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Displaced and offset logits ``(B, K, *)``, float32; strength 0 returns them as they are.

    Args:
        generator: of the random fields, on the device of the logits; ``None``: the global one.
    """
    logits = logits.float()
    if strength <= 0:
        return logits
    size = logits.shape[2:]
    dim = len(size)
    identity = torch.eye(dim, dim + 1, device=logits.device).expand(len(logits), dim, dim + 1)
    grid = affine_grid(identity, list(logits.shape), align_corners=True)
    shift = smooth_noise(logits, dim, generator).movedim(1, -1)
    # grid_sample counts axes from the last, from -1 to 1 over the image
    scale = torch.tensor([2 / max(1, s - 1) for s in reversed(size)], device=logits.device)
    grid = grid + strength * DISPLACEMENT * shift * scale
    moved = grid_sample(logits, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved + strength * OFFSET * smooth_noise(logits, logits.shape[1], generator)


def matching_strength(error: Callable[[float], float], wanted: float, *, iterations: int = 8) -> float:
    """Strength in [0, 1] at which ``error(strength)`` is ``wanted``, by bisection; the nearer end if there is none.

    Args:
        error: increasing on average; measured on the same images at every call.
        wanted: positive.
    """
    low, high = 0.0, 1.0
    if error(low) >= wanted:
        return low
    if error(high) <= wanted:
        return high
    for _ in range(iterations):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) < wanted else (low, middle)
    return (low + high) / 2
