"""Calibration of probabilities: NLL, Brier, ECE, ACE, MCE and the risk-coverage curve, additive over cases.

Every voxel gives one pair (confidence, outcome):
  * top-label (`calibration`): confidence is the probability of the predicted class, the outcome is whether it is right.
    Sigmoid regions are binary problems: confidence is max(p, 1 - p), and the pairs of all regions are pooled.
  * label-wise (`label_calibration`): confidence is the probability of one label, the outcome is whether the voxel has
    it. Shows over- and under-segmentation, which the top-label view folds together.

Definitions, n pairs:
  * NLL = mean of -log p(reference class), nats. The probability is clamped at 1e-7 in the logarithm, and nowhere
    else: a single 0 would make the mean infinite. Regions: binary cross-entropy, mean over regions.
  * Brier = mean of sum_k (p_k - [y = k])^2; regions and label-wise: mean of (p - y)^2, half of that for two classes.
  * ECE (Guo et al. 2017) = sum over equal-width bins [i/B, (i+1)/B) of count/n * |mean confidence - mean outcome|;
    MCE = the largest of these gaps, however few voxels the bin has; ACE (Nixon et al. 2019) = mean gap of B bins of
    equal mass.
  * AURC (Geifman and El-Yaniv 2017) = mean over i of the error rate among the i most confident voxels; confidence is
    that of the decision, also label-wise. E-AURC = AURC minus that of the best ranking with as many errors.

Everything is summed in float64. ECE, MCE, NLL and Brier are exact. ACE and the risk-coverage curve need the voxels
sorted, which cannot be kept over many cases: they use a histogram with 64 bins per halving of p and of 1 - p, so
confidences are told apart to about 1 % of their distance to 0 or 1. Within such a bin the order is random, and its
expected value is taken: ties, as in saturated probabilities, neither help nor harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import digamma

from nnunet_diffext.evaluation.voxel_pairs import Pairs, binary_pairs, blocks, labelwise_pairs, softmax_pairs

BINS = 15
METRICS = ("nll", "brier", "ece", "ace", "mce", "aurc", "eaurc")

_PER_OCTAVE, _OCTAVES = 64, 24  # 2^-24 is the last step of float32 below 1
_HALF = _PER_OCTAVE * _OCTAVES


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sufficient statistics of a set of voxels. ``a + b`` is the statistics of both sets.

    Attributes:
        table: ``(3, bins)`` count, sum of confidences and sum of outcomes per equal-width bin.
        ranking: ``(3, 2 * 1536)`` the same on the fine bins, from confidence 0 to 1.
        nll_sum: sum over the ``n`` pairs.
        brier_sum: sum over the ``n`` pairs.
        labelwise: confidence is the probability of a label instead of that of the decision.
    """

    table: np.ndarray
    ranking: np.ndarray
    nll_sum: float = 0.0
    brier_sum: float = 0.0
    labelwise: bool = False

    @classmethod
    def empty(cls, bins: int = BINS, labelwise: bool = False) -> Calibration:
        """Statistics of no voxel, the start of a sum.

        Raises:
            ValueError: fewer than one bin.
        """
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        return cls(np.zeros((3, bins)), np.zeros((3, 2 * _HALF)), labelwise=labelwise)

    def __add__(self, other: Calibration) -> Calibration:
        """Statistics of both sets of voxels.

        Raises:
            ValueError: different bins, or one is label-wise and the other is not.
        """
        if self.table.shape != other.table.shape or self.labelwise != other.labelwise:
            raise ValueError(
                f"cannot add statistics of {self.table.shape[1]} bins (labelwise={self.labelwise}) and "
                f"{other.table.shape[1]} bins (labelwise={other.labelwise})"
            )
        return Calibration(
            self.table + other.table,
            self.ranking + other.ranking,
            self.nll_sum + other.nll_sum,
            self.brier_sum + other.brier_sum,
            self.labelwise,
        )

    @property
    def n(self) -> int:
        """Number of pairs: voxels, times regions for sigmoid probabilities."""
        return int(self.table[0].sum())

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats."""
        return self._per_pair(self.nll_sum)

    @property
    def brier(self) -> float:
        """Brier score."""
        return self._per_pair(self.brier_sum)

    @property
    def ece(self) -> float:
        """Expected calibration error."""
        return self._per_pair(float(np.abs(self.table[1] - self.table[2]).sum()))

    @property
    def mce(self) -> float:
        """Maximum calibration error over the bins that are not empty."""
        count, confidence, outcome = self.table[:, self.table[0] > 0]
        return float(np.max(np.abs(confidence - outcome) / count)) if self.n else float("nan")

    @property
    def ace(self) -> float:
        """Adaptive calibration error: as many equal-mass bins as `table` has."""
        if not self.n:
            return float("nan")
        cumulative = np.cumsum(self.ranking[:, self.ranking[0] > 0], axis=1)
        count, confidence, outcome = np.concatenate([np.zeros((3, 1)), cumulative], axis=1)
        edges = np.linspace(0, count[-1], self.table.shape[1] + 1)
        gaps = np.diff(np.interp(edges, count, confidence)) - np.diff(np.interp(edges, count, outcome))
        return self._per_pair(float(np.abs(gaps).sum()))

    @property
    def aurc(self) -> float:
        """Area under the risk-coverage curve."""
        if not self.n:
            return float("nan")
        count, errors = self._ranked
        before = np.cumsum(count) - count
        errors_before = np.cumsum(errors) - errors
        # Among `count` tied voxels the i-th expects errors_before + i * rate errors; sum of that / (before + i) over i.
        rate = errors / count
        harmonic = digamma(before + count + 1) - digamma(before + 1)
        return self._per_pair(float((errors + (errors_before - before * rate) * harmonic).sum()))

    @property
    def eaurc(self) -> float:
        """AURC in excess of that of a ranking that puts every error last."""
        if not self.n:
            return float("nan")
        errors = float(self._ranked[1].sum())
        correct = self.n - errors
        return self.aurc - self._per_pair(errors - correct * float(digamma(self.n + 1) - digamma(correct + 1)))

    def risk_coverage(self) -> tuple[np.ndarray, np.ndarray]:
        """Coverage in (0, 1], ascending, and the error rate among that share of most confident voxels."""
        count, errors = self._ranked
        kept = np.cumsum(count)
        return kept / max(self.n, 1), np.cumsum(errors) / kept

    def reliability(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean confidence, mean outcome and count per equal-width bin, each ``(bins,)``; NaN where a bin is empty."""
        count = self.table[0]
        mean = np.full((2, count.size), np.nan)
        np.divide(self.table[1:], count, out=mean, where=count > 0)
        return mean[0], mean[1], count

    def as_dict(self) -> dict[str, float]:
        """All of `METRICS`; NaN if there is no voxel."""
        return {name: getattr(self, name) for name in METRICS}

    def _per_pair(self, total: float) -> float:
        return total / self.n if self.n else float("nan")

    @cached_property
    def _ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """Count and errors of the decision per occupied fine bin, most confident first."""
        count, _, outcome = self.ranking
        errors = count - outcome
        if self.labelwise:
            # p below one half decides against the label with confidence 1 - p, and is wrong where the label is there.
            count = np.concatenate([np.zeros(_HALF), count[_HALF:] + count[:_HALF][::-1]])
            errors = np.concatenate([np.zeros(_HALF), errors[_HALF:] + outcome[:_HALF][::-1]])
        occupied = np.flatnonzero(count)[::-1]
        return count[occupied], errors[occupied]


def calibration(
    probabilities: np.ndarray,
    reference: np.ndarray,
    *,
    regions: bool = False,
    mask: np.ndarray | None = None,
    bins: int = BINS,
) -> Calibration:
    """Top-label calibration of one case.

    Args:
        probabilities: ``(K, *)`` softmax over K classes, or ``(R, *)`` sigmoid per region.
        reference: ``(*)`` integer class per voxel, or ``(R, *)`` 0 or 1 per region.
        regions: which of the two.
        mask: ``(*)`` boolean, True for the voxels that count (not ignored, in the band, ...); default: all.
        bins: equal-width bins of ECE and MCE, equal-mass bins of ACE.

    Raises:
        ValueError: shapes do not fit, values are no probabilities, or the reference holds other classes.
    """
    probabilities, reference = np.asarray(probabilities), np.asarray(reference)
    expected = probabilities.shape if regions else probabilities.shape[1:]
    if reference.shape != expected:
        raise ValueError(f"probabilities {probabilities.shape} need a reference {expected}, got {reference.shape}")
    reference = reference.reshape(len(probabilities) if regions else 1, -1)
    pairs = binary_pairs if regions else softmax_pairs
    return _accumulate(probabilities, reference, mask, bins, pairs, labelwise=False)


def label_calibration(
    probability: np.ndarray, reference: np.ndarray, *, mask: np.ndarray | None = None, bins: int = BINS
) -> Calibration:
    """Label-wise calibration of one case.

    Args:
        probability: ``(*)`` probability of the label or region.
        reference: ``(*)`` 0 or 1, boolean or integer: whether the voxel has the label.
        mask: as in `calibration`.
        bins: as in `calibration`.

    Raises:
        ValueError: as in `calibration`.
    """
    probability, reference = np.asarray(probability)[None], np.asarray(reference)
    if reference.shape != probability.shape[1:]:
        raise ValueError(f"a probability {probability.shape[1:]} needs such a reference, got {reference.shape}")
    return _accumulate(probability, reference.reshape(1, -1), mask, bins, labelwise_pairs, labelwise=True)


def _accumulate(
    probabilities: np.ndarray,
    reference: np.ndarray,
    mask: np.ndarray | None,
    bins: int,
    pairs: Callable[[np.ndarray, np.ndarray], Pairs],
    labelwise: bool,
) -> Calibration:
    if mask is not None and np.shape(mask) != probabilities.shape[1:]:
        raise ValueError(f"the mask must have shape {probabilities.shape[1:]}, got {np.shape(mask)}")
    total = Calibration.empty(bins, labelwise)
    for p, y in blocks(probabilities.reshape(len(probabilities), -1), reference, mask):
        confidence, outcome, nll, brier = pairs(p, y)
        coarse = np.minimum((confidence * bins).astype(np.intp), bins - 1)
        table = _histogram(coarse, bins, confidence, outcome)
        ranking = _histogram(_fine_bin(confidence), 2 * _HALF, confidence, outcome)
        total += Calibration(table, ranking, float(nll.sum()), float(brier.sum()), labelwise)
    return total


def _histogram(index: np.ndarray, size: int, confidence: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(index, weights, minlength=size) for weights in (None, confidence, outcome)])


def _fine_bin(confidence: np.ndarray) -> np.ndarray:
    """Index of the fine bin: logarithmic in p below one half, mirrored in 1 - p above."""
    upper = confidence > 0.5  # one half decides against a region, as in nnU-Net
    distance = np.maximum(np.where(upper, 1 - confidence, confidence), 2.0 ** -(_OCTAVES + 1))
    step = np.minimum((-np.log2(distance) - 1) * _PER_OCTAVE, _HALF - 1).astype(np.intp)
    return np.where(upper, _HALF + step, _HALF - 1 - step)
