"""Conversions between x0, v and eps."""

import pytest
import torch

from nnunet_diffext.diffusion import SCHEDULES, NoiseSchedule, target, to_eps, to_x0

T = 1000
EPSILON = torch.finfo(torch.float32).eps


def batch(schedule):
    """x0, noise, x_t at every t: the batch index is t."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 2, (T, 2, 3, 3), generator=generator).float() * 2 - 1
    noise = torch.randn(T, 2, 3, 3, generator=generator)
    t = torch.arange(T)
    return x0, noise, t, schedule.add_noise(x0, noise, t)


def assert_within(actual, expected, tolerance):
    """|error| <= tolerance per t: float32 rounding times the conditioning of the division at that t."""
    error = (actual - expected).abs().flatten(1).amax(1)
    assert torch.isfinite(actual).all()
    assert (error <= tolerance).all(), (
        f"worst ratio {(error / tolerance).max():.2f} at t={(error / tolerance).argmax()}"
    )


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["x0", "v", "eps"])
def test_true_prediction_gives_x0_and_eps_at_every_t(name, zero_snr, kind):
    schedule = NoiseSchedule(name, T, zero_snr)
    if kind == "eps" and zero_snr:
        pytest.skip("raises, see below")
    x0, noise, t, x_t = batch(schedule)
    prediction = target(kind, x0, noise, t, schedule)
    alpha, sigma = schedule.marginal(t)
    # A few roundings of numbers below 6, divided by alpha (eps -> x0) or sigma (x0 -> eps).
    unit = 16 * EPSILON
    assert_within(to_x0(prediction, x_t, t, schedule, kind), x0, unit / alpha if kind == "eps" else unit)
    assert_within(to_eps(prediction, x_t, t, schedule, kind), noise, unit / sigma if kind == "x0" else unit)


@pytest.mark.parametrize("start, through", [("x0", "eps"), ("v", "x0"), ("v", "eps"), ("eps", "v"), ("eps", "x0")])
def test_round_trips_of_any_prediction(start, through):
    """Also for predictions that are wrong: a -> b -> a is the identity, given x_t."""
    schedule = NoiseSchedule("cosine", T)
    _, _, t, x_t = batch(schedule)
    prediction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))

    def convert(value, source, destination):
        x0, eps = to_x0(value, x_t, t, schedule, source), to_eps(value, x_t, t, schedule, source)
        return {"x0": x0, "eps": eps, "v": target("v", x0, eps, t, schedule)}[destination]

    back = convert(convert(prediction, start, through), through, start)
    alpha, sigma = schedule.marginal(t)
    # Conversions between eps and the others divide by alpha, between x0 and the others by sigma.
    conditioning = (1 / alpha if "eps" in (start, through) else 1) * (1 / sigma if "x0" in (start, through) else 1)
    assert_within(back, prediction, 32 * EPSILON * conditioning)


def test_v_at_zero_terminal_snr_is_minus_x0():
    schedule = NoiseSchedule("cosine", T, zero_terminal_snr=True)
    x0, noise, t = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4), torch.tensor([T - 1])
    assert torch.equal(target("v", x0, noise, t, schedule), -x0)
    assert torch.equal(schedule.add_noise(x0, noise, t), noise)


def test_eps_refused_at_zero_terminal_snr():
    schedule = NoiseSchedule("linear", T, zero_terminal_snr=True)
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor([3])
    for call in (
        lambda: to_x0(x, x, t, schedule, "eps"),
        lambda: to_eps(x, x, t, schedule, "eps"),
        lambda: target("eps", x, x, t, schedule),
    ):
        with pytest.raises(ValueError, match="zero terminal SNR.*'v' or 'x0'"):
            call()


def test_other_errors():
    schedule, x, t = NoiseSchedule("linear", T), torch.zeros(1, 1, 2, 2), torch.tensor([3])
    with pytest.raises(ValueError, match="'velocity'.*x0, v, eps"):
        to_x0(x, x, t, schedule, "velocity")
    with pytest.raises(ValueError, match="prediction and x_t differ in shape"):
        to_x0(torch.zeros(1, 2, 2, 2), x, t, schedule, "eps")
    with pytest.raises(ValueError, match="x0 and noise differ in shape"):
        target("v", x, x[..., :1], t, schedule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["x0", "v", "eps"])
def test_half_predictions_stay_finite_at_the_last_t(kind, dtype):
    schedule, t = NoiseSchedule("cosine", T), torch.tensor([T - 1])
    x_t = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = (torch.randn(1, 2, 8, 8) * 4).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        for convert in (to_x0, to_eps):
            value = convert(prediction, x_t.to(dtype), t, schedule, kind)
            assert value.dtype == torch.float32 and torch.isfinite(value).all()
        alpha, sigma = schedule.alpha_sigma(T - 1)
        if kind == "eps":  # up to 2e4 * 10: far beyond fp16
            expected = (x_t.to(dtype).double() - sigma * prediction.double()) / alpha
            actual = to_x0(prediction, x_t.to(dtype), t, schedule, kind).double()
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=16 * EPSILON / alpha)
            assert actual.abs().max() > torch.finfo(torch.float16).max
    assert schedule.sqrt_alpha_bar.dtype == torch.float32
