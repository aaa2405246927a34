"""Paired statistics of two models on the same cases: tests, effect sizes, interval, correction. All tests two-sided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_PAIRS = 6
RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedResult:
    """Second model against first model; differences are second minus first.

    Attributes:
        n: pairs in which both values are defined.
        mean_first: over these pairs.
        mean_second: over these pairs.
        difference: mean difference.
        ci_low: end of the 95 % bootstrap interval (BCa) of the mean difference; NaN below `MIN_PAIRS`.
        ci_high: the other end.
        rank_biserial: matched-pairs rank-biserial correlation, (W+ - W-) / (W+ + W-) over the ranks of the differences
            that are not zero (Kerby 2014): 1 if the second value is larger in every pair, -1 if smaller.
        cohens_dz: mean over standard deviation (n - 1) of the differences; NaN if they are all the same.
        wilcoxon_p: signed-rank test, pairs without a difference left out; NaN below `MIN_PAIRS`.
        permutation_p: exchange of the two values of a pair, statistic mean difference; all exchanges where there are
            at most `RESAMPLES` of them, else a random sample; NaN below `MIN_PAIRS`.
        note: why something is missing, or empty.
    """

    n: int
    mean_first: float
    mean_second: float
    difference: float
    ci_low: float
    ci_high: float
    rank_biserial: float
    cohens_dz: float
    wilcoxon_p: float
    permutation_p: float
    note: str = ""


def paired_statistics(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedResult:
    """Compare paired values.

    Args:
        first: one value per case; NaN where it is not defined, which leaves the pair out.
        second: of the same cases in the same order.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired values need one value of either model per case, got {a.shape} and {b.shape}")
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    d, nan = b - a, math.nan
    if d.size == 0:
        return PairedResult(0, nan, nan, nan, nan, nan, nan, nan, nan, nan, "no case in which both are defined")
    means = float(a.mean()), float(b.mean()), float(d.mean())
    effects = rank_biserial(d), cohens_dz(d)
    if d.size < MIN_PAIRS:
        why = (
            f"{d.size} pair(s): no test is given below {MIN_PAIRS}, because the smallest two-sided p-value that "
            f"{d.size} pairs can reach is {min(1.0, 2 / 2**d.size):.3g}"
        )
        return PairedResult(d.size, *means, nan, nan, *effects, nan, nan, why)
    if not d.any():
        return PairedResult(d.size, *means, 0.0, 0.0, *effects, 1.0, 1.0, "the values are the same in every pair")
    low, high = _interval(d, seed)
    wilcoxon = float(stats.wilcoxon(d).pvalue)
    zero = int(np.count_nonzero(d == 0))
    note = f"{zero} pair(s) without a difference, which the Wilcoxon test leaves out" if zero else ""
    return PairedResult(d.size, *means, low, high, *effects, wilcoxon, _permutation(a, b, seed), note)


def rank_biserial(differences: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation; 0 if no pair differs."""
    d = differences[differences != 0]
    if d.size == 0:
        return 0.0
    ranks = stats.rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum())


def cohens_dz(differences: np.ndarray) -> float:
    """Mean over standard deviation of the differences; NaN if that is 0 or there is only one."""
    if differences.size < 2 or np.ptp(differences) == 0:
        return math.nan
    return float(differences.mean() / differences.std(ddof=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN (no test) stays NaN and does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, math.nan)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def _interval(d: np.ndarray, seed: int) -> tuple[float, float]:
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    result = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean_difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    return np.mean(b - a, axis=axis)


def _permutation(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    result = stats.permutation_test(
        (a, b),
        _mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
