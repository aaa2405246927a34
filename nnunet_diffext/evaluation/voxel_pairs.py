"""From probabilities and a reference to what calibration counts: one confidence and outcome per voxel, checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LOG_FLOOR = 1e-7
_BLOCK = 1 << 20  # voxels at a time: bounds the memory of the float64 copies
_RANGE_TOLERANCE, _SUM_TOLERANCE = 1e-3, 1e-2  # half precision and resampling; logits are far beyond

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Confidence, outcome (0 or 1), -log-likelihood and Brier term of a block of voxels, float64, flat."""


def blocks(p: np.ndarray, y: np.ndarray, mask: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Checked blocks of voxels that count: probabilities ``(K, n)`` as float64 and reference ``(1 or R, n)``.

    Raises:
        ValueError: values that are no probabilities.
    """
    keep = None if mask is None else np.asarray(mask, dtype=bool).ravel()
    for start in range(0, p.shape[1], _BLOCK):
        part = slice(start, start + _BLOCK)
        block, target = p[:, part].astype(np.float64), y[:, part]
        if keep is not None:
            block, target = block[:, keep[part]], target[:, keep[part]]
        # Written so that NaN fails as well.
        if block.size and not (block.min() >= -_RANGE_TOLERANCE and block.max() <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"probabilities must lie in [0, 1], these reach from {block.min():.4g} to {block.max():.4g}: "
                "logits need a softmax or sigmoid first, and a NaN comes from a network that diverged"
            )
        yield np.clip(block, 0, 1), target


def softmax_pairs(p: np.ndarray, y: np.ndarray) -> Pairs:
    """Top-label pairs of softmax probabilities ``(K, n)`` and classes ``(1, n)``.

    Raises:
        ValueError: probabilities that do not sum to 1, or classes that have none.
    """
    worst = np.abs(p.sum(0) - 1).max(initial=0)
    if worst > _SUM_TOLERANCE:
        raise ValueError(
            f"class probabilities must sum to 1 per voxel, these are off by {worst:.3g}; pass regions=True for sigmoid"
        )
    y = y[0].astype(np.intp)
    if y.size and not (y.min() >= 0 and y.max() < len(p)):
        raise ValueError(
            f"the reference holds the classes {y.min()} to {y.max()}, but there are {len(p)} probabilities: mask "
            "ignored voxels, and check that prediction and reference have the same labels"
        )
    decision = p.argmax(0)
    reached = np.take_along_axis(p, y[None], 0)[0]
    brier = (p**2).sum(0) - 2 * reached + 1
    nll = -np.log(np.maximum(reached, LOG_FLOOR))
    return p.max(0), (decision == y).astype(np.float64), nll, brier


def binary_pairs(p: np.ndarray, y: np.ndarray) -> Pairs:
    """Top-label pairs of sigmoid probabilities and targets, both ``(R, n)``; one half decides against, as in nnU-Net.

    Raises:
        ValueError: as in `labelwise_pairs`.
    """
    p, y, nll, brier = labelwise_pairs(p, y)
    return np.maximum(p, 1 - p), ((p > 0.5) == (y > 0)).astype(np.float64), nll, brier


def labelwise_pairs(p: np.ndarray, y: np.ndarray) -> Pairs:
    """Label-wise pairs of probabilities and targets, both ``(R, n)``.

    Raises:
        ValueError: a target is neither 0 nor 1.
    """
    if y.size and not ((y == 0) | (y == 1)).all():
        raise ValueError(f"the reference of a region must be 0 or 1, got values from {y.min()} to {y.max()}")
    p, y = p.ravel(), y.ravel().astype(np.float64)
    reached = np.where(y > 0, p, 1 - p)
    return p, y, -np.log(np.maximum(reached, LOG_FLOOR)), (p - y) ** 2
