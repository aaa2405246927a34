"""Temperature: what it changes, what it must not, and whether the fit finds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from nnunet_diffext.inference.temperature import (
    VoxelSample,
    apply_temperature,
    at_the_limit,
    fit_temperature,
    log_odds,
    sample_voxels,
    weighted_nll,
)


def logits(n: int, heads: int = 3, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (heads, n))


def drawn_classes(p: np.ndarray, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random(p.shape[1]) > p.cumsum(0)).sum(0)[None]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    z = logits(500)
    found = apply_temperature(softmax(z, 0).astype(np.float32), temperature, False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax(z / temperature, 0), atol=2e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    regions = apply_temperature(expit(z).astype(np.float32), temperature, True)
    np.testing.assert_allclose(regions, expit(z / temperature), atol=2e-6)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.5, 10.0])
def test_the_decision_stays_and_the_likelihood_does_not(temperature: float) -> None:
    z = logits(5000)
    p = softmax(z, 0)
    found = apply_temperature(p, temperature, False)
    assert np.array_equal(found.argmax(0), p.argmax(0))
    q = expit(z)
    assert np.array_equal(apply_temperature(q, temperature, True) > 0.5, q > 0.5)
    y, weight = drawn_classes(p), np.ones(5000)
    before, after = (weighted_nll(log_odds(x, False), y, weight, 1) for x in (p, found))
    assert after > before * 1.001, "the classes were drawn from p: every other temperature is worse"


def test_saturated_probabilities_stay_finite() -> None:
    p = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]], np.float32)
    for regions in (False, True):
        for temperature in (0.05, 20.0):
            found = apply_temperature(p, temperature, regions)
            assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_no_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="positive number"):
        apply_temperature(np.ones((1, 2)), temperature, True)


@pytest.mark.parametrize("true", [0.5, 1.0, 2.2])
@pytest.mark.parametrize("regions", [False, True])
def test_the_fit_recovers_the_temperature(true: float, regions: bool) -> None:
    z = logits(60_000)
    if regions:
        y = (np.random.default_rng(3).random(z.shape) < expit(z / true)).astype(int)
        p = expit(z)
    else:
        y, p = drawn_classes(softmax(z / true, 0)), softmax(z, 0)
    halves = [VoxelSample(p[:, h], y[:, h], np.ones(30_000)) for h in (slice(0, 30_000), slice(30_000, None))]
    found = fit_temperature(halves, regions)
    assert found == pytest.approx(true, rel=0.03) and not at_the_limit(found)


def test_the_fit_knows_what_the_reference_calls_background() -> None:
    """Two of four classes were not looked for: a sure prediction of one is no error."""
    z = logits(60_000, heads=4)
    p, y = softmax(z, 0), drawn_classes(softmax(z / 1.5, 0))
    y[np.isin(y, (1, 3))] = 0
    found = (fit_temperature([VoxelSample(p, y, np.ones(60_000), hidden)], False) for hidden in ((1, 3), ()))
    assert next(found) == pytest.approx(1.5, rel=0.05)
    assert next(found) > 2, "taken for background, all of them are errors"


def test_weights_count_as_repetitions() -> None:
    z = logits(3000, scale=2)
    p, y = softmax(z, 0), drawn_classes(softmax(z / 1.7, 0))
    weight = np.random.default_rng(5).integers(1, 5, 3000)
    repeated = VoxelSample(p.repeat(weight, 1), y.repeat(weight, 1), np.ones(weight.sum()))
    weighted = VoxelSample(p, y, weight.astype(float))
    assert fit_temperature([weighted], False) == pytest.approx(fit_temperature([repeated], False), rel=1e-4)


def test_a_model_that_is_always_right_ends_at_the_limit() -> None:
    p = softmax(logits(1000), 0)
    found = fit_temperature([VoxelSample(p, p.argmax(0)[None], np.ones(1000))], False)
    assert at_the_limit(found)


def test_nothing_to_fit_on() -> None:
    with pytest.raises(ValueError, match="no annotated voxel"):
        fit_temperature([VoxelSample(np.ones((2, 0)), np.ones((1, 0)), np.ones(0))], False)


def test_the_voxel_sample_is_unbiased_and_holds_the_band() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 20, 20))
    band = np.zeros(values.shape, bool)
    band[4:6, 5:15, 5:15] = True
    values[band] += 5  # far from the rest, as losses near the boundary are
    valid = rng.random(values.shape) < 0.9
    truth = values[valid].sum()
    estimates = []
    for seed in range(400):
        index, weight = sample_voxels(band, valid, 300, np.random.default_rng(seed))
        assert len(index) == len(set(index)) == 300 and valid.ravel()[index].all()
        assert weight.sum() == pytest.approx(valid.sum())
        assert band.ravel()[index].sum() == 150
        estimates.append((weight * values.ravel()[index]).sum())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error
    unweighted = np.mean(values.ravel()[index]) * valid.sum()
    assert abs(unweighted - truth) > 100 * error, "without weights the estimate is far off"


@pytest.mark.parametrize("size", [0, 10, 400])
def test_the_voxel_sample_with_a_small_empty_or_large_band(size: int) -> None:
    band = np.arange(400) < size
    index, weight = sample_voxels(band, np.ones(400, bool), 100, np.random.default_rng(0))
    assert len(index) == 100 and weight.sum() == pytest.approx(400) and (weight >= 1).all()


def test_all_voxels_are_taken_if_they_fit() -> None:
    valid = np.arange(50) % 3 > 0
    index, weight = sample_voxels(np.zeros(50, bool), valid, 50, np.random.default_rng(0))
    assert np.array_equal(index, np.flatnonzero(valid)) and (weight == 1).all()


def test_the_likelihood_is_that_of_the_definition() -> None:
    z = logits(40)
    y = drawn_classes(softmax(z, 0))
    by_hand = -sum(log_softmax(z[:, i] / 2)[y[0, i]] for i in range(40))
    assert weighted_nll(z, y, np.ones(40), 2) == pytest.approx(by_hand)
