"""Losses of diffusion models on dense targets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from nnunet_diffext.losses.levels import over_levels
from nnunet_diffext.losses.segmentation import cross_entropy


def masked_error(prediction: Tensor, target: Tensor, valid: Tensor, *, squared: bool = True) -> Tensor:
    """Mean squared (PGRD eq. 8) or absolute error (LEAF eq. 4) over annotated voxels, in fp32; 0 if there is none.

    Args:
        prediction, target: ``(B, K, *)``.
        valid: ``(B, 1, *)``, bool or weights; averaged to the grid of the prediction, if it is finer.
    """
    valid = valid.float()
    if valid.shape[2:] != prediction.shape[2:]:
        pool = adaptive_avg_pool3d if prediction.ndim == 5 else adaptive_avg_pool2d
        valid = pool(valid, prediction.shape[2:])
    difference = prediction.float() - target.float()
    error = (difference.square() if squared else difference.abs()).mean(1, keepdim=True)
    return (valid * error).sum() / valid.sum().clamp_min(1e-5)


def deep_diffusion_supervision(
    logits: Sequence[Tensor], clean: Tensor, weight: Tensor, *, regions: bool = False
) -> Tensor:
    """Cross-entropy of the heads at several levels (PGRD eq. 6), see :func:`over_levels`.

    Args:
        logits: ``(B, K, *level)`` each, finest first.
        clean: one-hot ``(B, K, *)``.
        weight: ``(B, 1, *)``, non-negative.
        regions: independent heads.
    """
    return over_levels(partial(cross_entropy, regions=regions), logits, clean, weight.float())
