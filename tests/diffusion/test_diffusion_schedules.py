"""Noise schedules against closed forms, published values, Monte Carlo and diffusers."""

import copy
import math
import pickle

import pytest
import torch

from nnunet_diffext.diffusion import SCHEDULES, NoiseSchedule, betas, rescale_zero_terminal_snr

TABLES = ("beta", "alpha_bar", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")

# name: terminal alpha_bar, sqrt(alpha_bar), sigma/alpha; first index with sqrt(alpha_bar) < 0.5 and < 0.1 (T = 1000)
TERMINAL = {
    "linear": (4.04e-5, 6.35e-3, 157, 367, 673),
    "scaled_linear": (6.69e-4, 2.59e-2, 38.7, 417, 800),
    "latent_linear": (1.95e-4, 1.39e-2, 71.7, 349, 709),
    "cosine": (2.43e-9, 4.93e-5, 2.03e4, 663, 935),
}


def step_betas(name, timesteps, zero_snr):
    """Per-step variances from the schedule's definition, not from NoiseSchedule."""
    beta = betas(name, timesteps)
    return rescale_zero_terminal_snr(beta) if zero_snr else beta


def test_every_schedule_has_published_values():
    assert set(TERMINAL) == set(SCHEDULES)


@pytest.mark.parametrize("name", TERMINAL)
def test_published_terminal_values(name):
    alpha_bar, alpha, ratio, half, tenth = TERMINAL[name]
    schedule = NoiseSchedule(name, 1000)
    assert schedule.alpha_bar[-1].item() == pytest.approx(alpha_bar, rel=5e-3)
    assert schedule.sqrt_alpha_bar[-1].item() == pytest.approx(alpha, rel=5e-3)
    terminal_ratio = schedule.sqrt_one_minus_alpha_bar[-1] / schedule.sqrt_alpha_bar[-1]
    assert terminal_ratio.item() == pytest.approx(ratio, rel=5e-3)
    for level, index in ((0.5, half), (0.1, tenth)):
        crossing = int((schedule.sqrt_alpha_bar > level).sum())
        assert abs(crossing - index) <= 1, "published as the nearest index"


@pytest.mark.parametrize("name", SCHEDULES)
def test_limits(name):
    beta = betas(name, 1000)
    assert beta.shape == (1000,) and beta.dtype == torch.float64
    assert 0 < beta.min() and beta.max() <= 0.999


def test_linear_limits():
    beta = betas("linear", 1000)
    assert (beta[0].item(), beta[-1].item()) == pytest.approx((1e-4, 2e-2), rel=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_marginal_is_the_iterated_one_step_kernel_monte_carlo(name, zero_snr):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eta, iterated, against the closed form (1 %)."""
    timesteps, count, x0 = 200, 200_000, 1.5
    schedule = NoiseSchedule(name, timesteps, zero_snr)
    beta = step_betas(name, timesteps, zero_snr).tolist()
    generator = torch.Generator().manual_seed(3)
    x = torch.full((count,), x0)
    check = {1, timesteps // 4, timesteps // 2, timesteps - 1}
    for t in range(timesteps):
        eta = torch.empty(count).normal_(generator=generator)
        x.mul_(math.sqrt(1 - beta[t])).add_(eta, alpha=math.sqrt(beta[t]))
        if t in check:
            alpha, sigma = (table.item() for table in schedule.marginal(torch.tensor([t])))
            # The mean's standard error is sigma / sqrt(count) <= 0.0023, the variance's sqrt(2 / count) = 0.3 %.
            assert x.mean().item() == pytest.approx(alpha * x0, abs=0.01)
            assert x.var().item() == pytest.approx(sigma**2, rel=0.014)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_marginal_is_the_iterated_one_step_kernel_exactly(name, zero_snr):
    """The same with the moments themselves, T = 1000, every t."""
    schedule = NoiseSchedule(name, 1000, zero_snr)
    factor, variance, moments = 1.0, 0.0, []
    for b in step_betas(name, 1000, zero_snr).tolist():
        factor, variance = factor * math.sqrt(1 - b), (1 - b) * variance + b
        moments.append((factor, math.sqrt(variance)))
    expected = torch.tensor(moments, dtype=torch.float64)
    torch.testing.assert_close(schedule.sqrt_alpha_bar.double(), expected[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(schedule.sqrt_one_minus_alpha_bar.double(), expected[:, 1], rtol=1e-6, atol=0)
    for t in (0, 1, 250, 999):
        assert schedule.alpha_sigma(t) == pytest.approx(moments[t], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr(name):
    plain, zero = NoiseSchedule(name, 1000), NoiseSchedule(name, 1000, zero_terminal_snr=True)
    assert zero.alpha_bar[-1] == 0 and zero.sqrt_one_minus_alpha_bar[-1] == 1 and zero.beta[-1] == 1
    assert zero.alpha_sigma(999) == (0.0, 1.0)
    assert zero.sqrt_alpha_bar[0].item() == pytest.approx(plain.sqrt_alpha_bar[0].item(), rel=1e-6)
    assert (zero.sqrt_alpha_bar.diff() < 0).all()
    # Algorithm 1 is an affine map of sqrt(alpha_bar).
    scale = (zero.sqrt_alpha_bar[0] - zero.sqrt_alpha_bar[-1]) / (plain.sqrt_alpha_bar[0] - plain.sqrt_alpha_bar[-1])
    torch.testing.assert_close(zero.sqrt_alpha_bar, scale * (plain.sqrt_alpha_bar - plain.sqrt_alpha_bar[-1]))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "name, config",
    [
        ("linear", dict(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)),
        ("scaled_linear", dict(beta_schedule="scaled_linear", beta_start=1.5e-3, beta_end=1.55e-2)),
        ("latent_linear", dict(beta_schedule="linear", beta_start=1.5e-3, beta_end=1.55e-2)),
        ("cosine", dict(beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_tables_match_diffusers(name, config, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(num_train_timesteps=1000, rescale_betas_zero_snr=zero_snr, **config)
    # Theirs are cumulative products in float32: 1000 roundings of 6e-8.
    torch.testing.assert_close(
        NoiseSchedule(name, 1000, zero_snr).alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).half()[1],
        lambda m: m.half().float(),
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
def test_tables_survive_casts(cast):
    reference = NoiseSchedule("cosine", 1000)
    tables = {key: getattr(reference, key).clone() for key in TABLES}
    result = cast(reference)
    for key, table in tables.items():
        assert getattr(result, key).dtype == torch.float32
        assert torch.equal(getattr(result, key), table), key


def test_half_casts_the_neighbours():
    assert torch.nn.Sequential(torch.nn.Linear(2, 2), NoiseSchedule()).half()[0].weight.dtype == torch.float16


def test_tables_follow_the_device_and_stay_out_of_the_checkpoint():
    schedule = NoiseSchedule("linear", 10)
    assert schedule.state_dict() == {}
    assert schedule.to("meta").alpha_bar.device.type == "meta"
    with torch.device("meta"):
        built = NoiseSchedule("linear", 10)
    assert torch.equal(built.to_empty(device="cpu").alpha_bar, NoiseSchedule("linear", 10).alpha_bar)


@pytest.mark.parametrize("spatial", [(4, 5), (2, 3, 4)])
def test_add_noise(spatial):
    schedule = NoiseSchedule("cosine", 1000)
    x0, noise = torch.randn(3, 2, *spatial), torch.randn(3, 2, *spatial)
    t = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(x0, noise, t)
    for i in range(3):
        alpha, sigma = schedule.alpha_sigma(int(t[i]))
        expected = alpha * x0[i].double() + sigma * noise[i].double()
        torch.testing.assert_close(noisy[i].double(), expected, rtol=1e-6, atol=1e-6)
    assert schedule.marginal(t, 5)[0].shape == (3, 1, 1, 1, 1) and schedule.marginal(t)[0].shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_noise_is_float32_under_autocast(dtype):
    schedule = NoiseSchedule("cosine", 1000)
    x0, noise, t = torch.ones(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([1, 999])
    expected = schedule.add_noise(x0, noise, t)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(schedule.add_noise(x0, noise, t), expected)
        assert schedule.add_noise(x0.to(dtype), noise.to(dtype), t).dtype == torch.float32
    assert schedule.alpha_bar.dtype == torch.float32


def test_errors():
    with pytest.raises(ValueError, match="'quadratic'.*linear.*cosine"):
        NoiseSchedule("quadratic")
    with pytest.raises(ValueError, match="timesteps=0"):
        NoiseSchedule("linear", 0)
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        NoiseSchedule("linear", 1, zero_terminal_snr=True)
    assert "zero_terminal_snr=True" in repr(NoiseSchedule("linear", 7, True))
