"""Feature distillation from a frozen vision transformer (LEAF, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def feature_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - mean cosine`` over all tokens of all samples (eq. 5, plus one so that zero is perfect).

    A mean per token: repeating the samples of a batch does not change it. (The authors' code divides by the batch size
    once more; its lambda is ours times the batch size.)

    Args:
        student, teacher: ``(B, D, h, w)``, projected features and patch tokens of the same grid.
    Raises:
        ValueError: their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree, token by token"
        )
    with torch.autocast(student.device.type, enabled=False):
        return 1 - cosine_similarity(student.float(), teacher.float(), dim=1).mean()


def axial_slices(image: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slices of the image along its first axis, and the feature slices that lie on them.

    Args:
        image: ``(B, C, H, W)``, returned as it is, or ``(B, C, D, H, W)``.
        features: ``(B, F, h, w)`` or ``(B, F, d, h, w)``.
        count: at most this many slices per volume, drawn at random.
    Returns:
        ``(N, C, H, W)`` and ``(N, F, h, w)``.
    """
    if image.ndim == 4:
        return image, features
    depth = features.shape[2]
    chosen = torch.randperm(depth)[:count]
    step = image.shape[2] / depth
    at = ((chosen + 0.5) * step).long().clamp_max(image.shape[2] - 1)
    return _as_batch(image, at), _as_batch(features, chosen)


def _as_batch(x: Tensor, slices: Sequence[int] | Tensor) -> Tensor:
    """``(B, C, D, H, W)`` -> ``(B n, C, H, W)``."""
    return x[:, :, slices].transpose(1, 2).flatten(0, 1)
