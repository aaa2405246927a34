"""Calibration against values by hand, an independent binning, and data whose calibration is known."""

import math

import numpy as np
import pytest
import torch

from nnunet_diffext.evaluation.calibration import METRICS, Calibration, calibration, label_calibration

N = 200_000


def softmax_problem(rng, n=4000, classes=3, sharpness=2.0):
    """Probabilities and labels drawn from exactly these: perfectly calibrated."""
    logits = sharpness * rng.normal(size=(classes, n))
    p = np.exp(logits) / np.exp(logits).sum(0)
    return p, (rng.random(n) > p.cumsum(0)).sum(0)


def two_class(confidence):
    """Softmax over two classes that decides for class 0 with this confidence."""
    confidence = np.asarray(confidence, dtype=float)
    return np.stack([confidence, 1 - confidence])


def discrete_aurc(errors_by_confidence):
    errors = np.asarray(errors_by_confidence, dtype=float)
    return float(np.mean(np.cumsum(errors) / np.arange(1, errors.size + 1)))


def test_nll_and_brier_by_hand():
    p = np.array([[0.7, 0.2], [0.2, 0.5], [0.1, 0.3]])
    result = calibration(p, np.array([0, 2]))
    assert result.n == 2
    assert result.nll == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    brier = (0.3**2 + 0.2**2 + 0.1**2) + (0.2**2 + 0.5**2 + 0.7**2)
    assert result.brier == pytest.approx(brier / 2)


def test_regions_are_binary_problems_by_hand():
    p, y = np.array([[0.9, 0.4], [0.8, 0.5]]), np.array([[1, 1], [0, 0]])
    result = calibration(p, y, regions=True)
    assert result.n == 4
    assert result.nll == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.2, 0.5))) / 4)
    assert result.brier == pytest.approx((0.1**2 + 0.6**2 + 0.8**2 + 0.5**2) / 4)
    # Decisions, nnU-Net's p > 0.5: right 0.9, wrong 0.6, wrong 0.8, right 0.5; all in bins of their own.
    assert result.ece == pytest.approx((0.1 + 0.6 + 0.8 + 0.5) / 4)
    assert result.mce == pytest.approx(0.8)


def test_two_classes_as_softmax_and_as_region():
    p, y = softmax_problem(np.random.default_rng(0), classes=2)
    soft, region = calibration(p, y), calibration(p[1:], y[None], regions=True)
    assert region.brier == pytest.approx(soft.brier / 2)
    for name in set(METRICS) - {"brier"}:
        assert getattr(region, name) == pytest.approx(getattr(soft, name)), name


def test_probability_is_clamped_in_the_logarithm_only():
    result = calibration(two_class([1.0, 1.0]), np.array([0, 1]))
    assert result.nll == pytest.approx(-math.log(1e-7) / 2)
    assert result.brier == 1.0 and result.ece == pytest.approx(0.5)


def test_perfectly_calibrated_data():
    rng = np.random.default_rng(1)
    p, y = softmax_problem(rng, N)
    result = calibration(p, y)
    # Expected |gap| of a bin with m voxels of accuracy a is sqrt(2 a (1 - a) / (pi m)); summed with weight m / N.
    confidence, _, count = result.reliability()
    used = count > 0
    expected = (np.sqrt(2 * (confidence * (1 - confidence))[used] / math.pi * count[used])).sum() / N
    assert 0 < expected < 0.004
    assert result.ece < 2 * expected and result.ace < 2 * expected
    for label in range(3):
        assert label_calibration(p[label], y == label).ece < 2 * expected
    # The reverse of an empty test: the same data with hardened probabilities is far off.
    hard = p**3 / (p**3).sum(0)
    assert calibration(hard, y).ece > 20 * expected


@pytest.mark.parametrize("accuracy", [0.5, 0.7, 0.95])
def test_known_miscalibration(accuracy):
    wrong = round(1000 * (1 - accuracy))
    result = calibration(two_class(np.full(1000, 0.9)), np.arange(1000) < wrong)
    gap = abs(0.9 - accuracy)
    assert [result.ece, result.mce, result.ace] == pytest.approx([gap] * 3)


def test_gaps_of_opposite_sign_do_not_cancel_and_bins_decide():
    # 0.62 right always, 0.98 right half of the time.
    p, y = two_class([0.62] * 100 + [0.98] * 100), np.r_[np.zeros(100), np.tile([0, 1], 50)]
    result = calibration(p, y)
    assert result.ece == pytest.approx((0.38 + 0.48) / 2) and result.mce == pytest.approx(0.48)
    assert calibration(p, y, bins=1).ece == pytest.approx(0.05)


def test_bins_agree_with_monai():
    from monai.metrics import calibration_binning

    rng = np.random.default_rng(2)
    p, y = softmax_problem(rng)
    p = p.astype(np.float32)
    for label in range(3):
        ours = label_calibration(p[label], y == label, bins=10).reliability()
        arrays = (torch.from_numpy(p[label][None, None]), torch.from_numpy((y == label)[None, None]).float())
        theirs = [t[0, 0].numpy() for t in calibration_binning(*arrays, num_bins=10)]
        np.testing.assert_array_equal(ours[2], theirs[2])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)


def test_ace_is_equal_mass():
    rng = np.random.default_rng(3)
    p, y = softmax_problem(rng, 6000)
    p = p**2 / (p**2).sum(0)
    confidence, correct = p.max(0), p.argmax(0) == y
    parts = np.array_split(np.argsort(confidence), 15)
    naive = np.mean([abs(confidence[i].mean() - correct[i].mean()) for i in parts])
    # The histogram orders voxels to 1 % of 1 - p; its bins swap neighbours of nearly the same confidence.
    assert calibration(p, y).ace == pytest.approx(naive, abs=0.003) and naive > 0.05


def test_aurc_of_perfect_and_worst_ranking():
    confidence = np.linspace(0.99, 0.55, 40)
    perfect = calibration(two_class(confidence), np.arange(40) >= 30)
    worst = calibration(two_class(confidence), np.arange(40) < 10)
    assert perfect.aurc == pytest.approx(discrete_aurc(np.arange(40) >= 30))
    assert perfect.eaurc == pytest.approx(0, abs=1e-12)
    assert worst.aurc == pytest.approx(discrete_aurc(np.arange(40) < 10))
    assert worst.eaurc == pytest.approx(worst.aurc - perfect.aurc)


def test_aurc_of_ties_is_the_error_rate():
    result = calibration(two_class(np.ones(1000)), np.arange(1000) < 130)
    assert result.aurc == pytest.approx(0.13)
    coverage, risk = result.risk_coverage()
    assert coverage.tolist() == [1.0] and risk.tolist() == [0.13]


def test_aurc_agrees_with_sorting_every_voxel():
    rng = np.random.default_rng(4)
    p, y = softmax_problem(rng, N)
    order = np.argsort(-p.max(0))
    naive = discrete_aurc((p.argmax(0) != y)[order])
    assert calibration(p, y).aurc == pytest.approx(naive, rel=1e-3)
    # Label-wise, the ranking is that of the decision for or against the label.
    binary = p[1] > 0.5
    order = np.argsort(-np.maximum(p[1], 1 - p[1]))
    assert label_calibration(p[1], y == 1).aurc == pytest.approx(discrete_aurc((binary != (y == 1))[order]), rel=1e-3)


def test_risk_coverage_ends_at_the_error_rate():
    p, y = softmax_problem(np.random.default_rng(5))
    coverage, risk = calibration(p, y).risk_coverage()
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(np.mean(p.argmax(0) != y))
    assert (np.diff(coverage) > 0).all() and risk[len(risk) // 4] < risk[-1]


@pytest.mark.parametrize("kind", ["softmax", "regions", "labelwise"])
def test_sum_of_parts_equals_pooled(kind):
    p, y = softmax_problem(np.random.default_rng(6), 3000)

    def statistics(part):
        if kind == "softmax":
            return calibration(p[:, part], y[part])
        if kind == "regions":
            return calibration(p[1:, part], np.stack([y == 1, y == 2])[:, part], regions=True)
        return label_calibration(p[2, part], y[part] == 2)

    parts = [statistics(slice(*ends)) for ends in ((0, 100), (100, 1700), (1700, 3000))]
    merged, pooled = sum(parts[1:], parts[0]), statistics(slice(None))
    assert merged.n == pooled.n
    assert merged.as_dict() == pytest.approx(pooled.as_dict(), rel=1e-12)
    # Not the mean of the parts: that is the other figure, and they differ.
    assert merged.ece != pytest.approx(np.mean([part.ece for part in parts]), rel=1e-3)


def test_more_voxels_than_one_block(monkeypatch):
    from nnunet_diffext.evaluation import voxel_pairs

    p, y = softmax_problem(np.random.default_rng(7), 1000)
    mask = np.random.default_rng(8).random(1000) > 0.3
    whole = calibration(p, y, mask=mask)
    monkeypatch.setattr(voxel_pairs, "_BLOCK", 64)
    assert calibration(p, y, mask=mask).as_dict() == pytest.approx(whole.as_dict(), rel=1e-12)
    assert whole.as_dict() == pytest.approx(calibration(p[:, mask], y[mask]).as_dict(), rel=1e-12)


def test_masked_voxels_count_for_nothing_whatever_they_hold():
    p, y = softmax_problem(np.random.default_rng(9), 600)
    p, y = p.reshape(3, 6, 10, 10), y.reshape(6, 10, 10)
    clean = calibration(p[:, 2:], y[2:])
    p[:, :2], y[:2] = np.nan, 99
    mask = np.zeros(y.shape, bool)
    mask[2:] = True
    assert calibration(p, y, mask=mask).as_dict() == pytest.approx(clean.as_dict(), rel=1e-12)


def test_no_voxel_is_nan_and_neutral():
    p, y = softmax_problem(np.random.default_rng(10), 50)
    nothing = calibration(p, y, mask=np.zeros(50, bool))
    assert nothing.n == 0 and all(math.isnan(v) for v in nothing.as_dict().values())
    assert [len(a) for a in nothing.risk_coverage()] == [0, 0]
    assert (nothing + calibration(p, y)).as_dict() == calibration(p, y).as_dict()


def test_half_precision_is_accepted_and_summed_in_double():
    p, y = softmax_problem(np.random.default_rng(11), N)
    single, half = (calibration(p.astype(t), y) for t in (np.float32, np.float16))
    assert single.nll == pytest.approx(calibration(p, y).nll, rel=1e-6)
    assert half.nll == pytest.approx(single.nll, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y: (5 * p, y), "logits need a softmax"),
        (lambda p, y: (p * np.nan, y), "NaN"),
        (lambda p, y: (0.9 * p, y), "sum to 1"),
        (lambda p, y: (p, y + 3), "3 probabilities"),
        (lambda p, y: (p, y - 3), "3 probabilities"),
        (lambda p, y: (p, y[:-1]), "need a reference"),
    ],
)
def test_what_is_no_probability_is_refused(change, message):
    p, y = softmax_problem(np.random.default_rng(12), 20)
    with pytest.raises(ValueError, match=message):
        calibration(*change(p, y))


def test_other_wrong_input_is_refused():
    p, y = softmax_problem(np.random.default_rng(13), 20)
    with pytest.raises(ValueError, match="mask must have shape"):
        calibration(p, y, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="0 or 1"):
        calibration(p, np.full((3, 20), 2), regions=True)
    with pytest.raises(ValueError, match="cannot add"):
        calibration(p, y) + label_calibration(p[0], y == 0)
    with pytest.raises(ValueError, match="cannot add"):
        calibration(p, y) + calibration(p, y, bins=10)
    with pytest.raises(ValueError, match="at least 1"):
        Calibration.empty(0)
