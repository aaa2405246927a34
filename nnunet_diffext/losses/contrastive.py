"""Contrastive alignment of two feature maps (DMED-Seg, inter-expert feature alignment, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def inter_expert_alignment(
    a: Tensor, b: Tensor, *, temperature: float = 0.1, max_locations: int = 1024, weight: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE between the same locations of two feature maps.

    Eq. 3 leaves the positive pair out of its denominator, which makes it unbounded below; InfoNCE (van den Oord et al.
    2018) includes it. Negatives are the other sampled locations of the same image and of the other images.

    Args:
        a, b: features ``(B, E, *)`` of the two experts.
        temperature: tau.
        max_locations: at most this many locations of the batch are drawn.
        weight: ``(B, 1, *)`` importance of the locations, e.g. ``1 - confidence``; uniform if ``None``.

    Returns:
        A scalar >= 0; mean over the sampled locations.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = _locations(a.float()), _locations(b.float())
        w = torch.ones(len(a), device=a.device) if weight is None else _locations(weight.float())[:, 0]
        if len(a) > max_locations:
            chosen = torch.randperm(len(a), device=a.device)[:max_locations]
            a, b, w = a[chosen], b[chosen], w[chosen]
        similarity = normalize(a, dim=1) @ normalize(b, dim=1).T / temperature
        positives = torch.arange(len(a), device=a.device)
        loss = cross_entropy(similarity, positives, reduction="none") + cross_entropy(
            similarity.T, positives, reduction="none"
        )
        return (w * loss).sum() / (2 * w.sum().clamp_min(1e-5))


def _locations(features: Tensor) -> Tensor:
    """``(B, E, *)`` -> ``(B N, E)``."""
    return features.flatten(2).transpose(1, 2).flatten(0, 1)
