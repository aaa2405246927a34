"""One temperature for all probabilities of a model (Guo et al. 2017), applied to the ensemble's mean.

    softmax   p_k <- p_k^(1/T) / sum_j p_j^(1/T)
    regions   p   <- sigmoid(logit(p) / T)

The order of the classes, and on which side of one half a region lies, stay: the segmentation does not change. T > 1
makes an over-confident model more modest. T minimises the negative log-likelihood of cases that were not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax, logsumexp

LOWEST, HIGHEST = 0.05, 20.0
#: The smallest step below 1 in float32: a logit of +-16.6.
_EDGE = 2.0**-24


def apply_temperature(probabilities: np.ndarray, temperature: float, regions: bool) -> np.ndarray:
    """Probabilities ``(K, *)`` at another temperature, of the same dtype; they themselves at T = 1.

    Raises:
        ValueError: T is not a positive number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"A temperature must be a positive number; got {temperature}.")
    if temperature == 1:
        return probabilities
    logits = log_odds(probabilities, regions)
    logits /= temperature
    if regions:
        return np.exp(log_expit(logits)).astype(probabilities.dtype)
    logits -= logits.max(0, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(0, keepdims=True)
    return logits.astype(probabilities.dtype)


def log_odds(probabilities: np.ndarray, regions: bool) -> np.ndarray:
    """Logits ``(K, *)``, finite, float32 or wider, whose softmax (sigmoid) are the probabilities."""
    p = probabilities.astype(np.result_type(probabilities.dtype, np.float32))
    if regions:
        p = np.clip(p, _EDGE, 1 - _EDGE)
        return np.log(p) - np.log1p(-p)
    return np.log(np.maximum(p, np.finfo(np.float32).tiny))


@dataclass(frozen=True)
class VoxelSample:
    """Voxels to fit on: probabilities ``(K, n)``, reference ``(1, n)`` classes or ``(K, n)`` 0 and 1 per region, and
    how many voxels of the image each stands for ``(n,)``. ``hidden``: classes that the reference calls background.
    """

    probabilities: np.ndarray
    reference: np.ndarray
    weight: np.ndarray
    hidden: tuple[int, ...] = ()


def sample_voxels(
    band: np.ndarray, valid: np.ndarray, limit: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of at most ``limit`` voxels, half of them from the band, and their weights.

    Weight = size of the stratum / number drawn from it: a weighted sum over the sample estimates the sum over all
    valid voxels without bias. If all fit, all are taken.

    Args:
        band: ``(*)`` boolean, voxels around the foreground, where errors are.
        valid: ``(*)`` boolean, voxels that count.
        limit: at least 2.
        generator: drawn from.
    """
    valid = valid.ravel()
    if np.count_nonzero(valid) <= limit:
        indices = np.flatnonzero(valid)
        return indices, np.ones(indices.size)
    strata = [np.flatnonzero(valid & band.ravel()), np.flatnonzero(valid & ~band.ravel())]
    half = limit // 2
    # what one stratum cannot fill goes to the other
    first = min(strata[0].size, max(half, limit - strata[1].size))
    counts = [first, min(strata[1].size, limit - first)]
    indices, weights = [], []
    for stratum, count in zip(strata, counts, strict=True):
        if count:
            indices.append(generator.choice(stratum, count, replace=False))
            weights.append(np.full(count, stratum.size / count))
    return np.concatenate(indices), np.concatenate(weights)


def weighted_nll(
    logits: np.ndarray, reference: np.ndarray, weight: np.ndarray, temperature: float, hidden: Sequence[int] = ()
) -> float:
    """Sum of weighted negative log-likelihoods in nats, float64.

    Args:
        logits: ``(K, n)``.
        reference: ``(1, n)`` integer classes (softmax), or ``(K, n)`` 0 or 1 (regions; the mean over regions counts).
        weight: ``(n,)``.
        temperature: T.
        hidden: classes that the reference calls background (softmax).
    """
    scaled = logits / temperature
    if len(reference) == 1 and len(logits) > 1:
        log_p = log_softmax(scaled, axis=0)
        if hidden:
            log_p[0] = logsumexp(log_p[[0, *hidden]], axis=0)
        likelihood = np.take_along_axis(log_p, reference, 0)[0]
    else:
        likelihood = log_expit(np.where(reference > 0, scaled, -scaled)).mean(0)
    return float(-(weight * likelihood).sum())


def fit_temperature(samples: Sequence[VoxelSample], regions: bool) -> float:
    """T that minimises the negative log-likelihood of all samples together.

    Raises:
        ValueError: there is nothing to fit on.
    """
    parts = [
        (log_odds(s.probabilities.astype(np.float64), regions), s.reference.astype(np.intp), s.weight, s.hidden)
        for s in samples
        if s.weight.size
    ]
    total = sum(weight.sum() for _, _, weight, _ in parts)
    if not total:
        raise ValueError("There is no annotated voxel to fit a temperature on.")

    def objective(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        return sum(weighted_nll(*part, temperature, hidden) for *part, hidden in parts) / total

    found = minimize_scalar(
        objective, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-5}
    )
    return math.exp(float(found.x))


def at_the_limit(temperature: float) -> bool:
    """Whether a fit ended at the edge of the range that was searched."""
    return not 1.01 * LOWEST < temperature < HIGHEST / 1.01
