"""Samplers with exact denoisers: analytic posteriors, marginals and frequencies."""

import math

import pytest
import torch
from denoisers import SAMPLERS, BernoulliDenoiser, T, one_step_sampler, smooth_model

from nnunet_diffext.diffusion import (
    NoiseSchedule,
    ddim,
    ddpm,
    one_step,
    seeded_noise,
    start_of_sample,
    target,
    to_eps,
    trailing_timesteps,
)

# ----------------------------------------------------------------------------------------- exact denoisers, oracles


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spatial", [(5, 4), (3, 4, 2)])
@pytest.mark.parametrize("name, steps", [(n, s) for n in SAMPLERS for s in (1, 2, 7, 50)] + [("one_step", 1)])
def test_oracle_returns_x0_exactly(name, steps, spatial, zero_snr):
    truth = torch.randint(0, 2, (2, 3, *spatial)).float() * 2 - 1
    sampler = {**SAMPLERS, "one_step": one_step_sampler}[name]
    schedule = NoiseSchedule("cosine", T, zero_snr)
    assert torch.equal(sampler(lambda x, t: truth, torch.randn_like(truth), schedule, steps), truth)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_v_oracle_returns_x0(name, zero_snr):
    """The v that points from the current x_t to the truth, so the loop's own x_t must lie on the process."""
    truth = torch.randint(0, 2, (2, 3, 5, 4)).float() * 2 - 1
    schedule = NoiseSchedule("cosine", T, zero_snr)

    def model(x, t):
        return target("v", truth, to_eps(truth, x, t, schedule, "x0"), t, schedule)

    torch.testing.assert_close(SAMPLERS[name](model, torch.randn_like(truth), schedule, 10, kind="v"), truth)


@pytest.mark.parametrize("steps", [10, 300])
@pytest.mark.parametrize("name", SAMPLERS)
def test_states_keep_the_forward_marginal(name, steps):
    """With the true x0 predicted, x_t at every visited t must be distributed as q(x_t | x0)."""
    truth, schedule = torch.full((1, 1, 200, 200), 0.8), NoiseSchedule("cosine", T, zero_terminal_snr=True)

    def callback(step, t, x_t, x0):
        alpha, sigma = schedule.alpha_sigma(t)
        # 40 000 voxels: 4 standard errors of mean and standard deviation
        assert x_t.mean().item() == pytest.approx(0.8 * alpha, abs=4 * sigma / 200)
        assert x_t.std().item() == pytest.approx(sigma, rel=4 / (200 * math.sqrt(2)))

    generator = torch.Generator().manual_seed(5)
    x_T = torch.randn(truth.shape, generator=generator)
    kwargs = {"generator": generator} if name == "ddpm" else {}
    SAMPLERS[name](lambda x, t: truth, x_T, schedule, steps, callback=callback, **kwargs)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddpm_steps_are_the_posterior_of_the_strided_chain(zero_snr):
    """Mean and variance as printed by Ho et al. with alpha_{t|u}; 7 does not divide 1000."""
    schedule, steps = NoiseSchedule("cosine", T, zero_snr), 7
    alpha_bar = [schedule.alpha_sigma(t)[0] ** 2 for t in trailing_timesteps(T, steps)]
    visited = []
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(1, 2, 3, 3, generator=generator)
    state = generator.get_state()
    ddpm(smooth_model, x_T, schedule, steps, generator=generator, callback=lambda *args: visited.append(args[2:]))
    generator.set_state(state)
    for i in range(steps - 1):
        (x_t, x0), (x_u, _) = visited[i], visited[i + 1]
        here, there = alpha_bar[i], alpha_bar[i + 1]
        ratio = here / there
        mean = math.sqrt(there) * (1 - ratio) / (1 - here) * x0 + math.sqrt(ratio) * (1 - there) / (1 - here) * x_t
        deviation = math.sqrt((1 - there) * (1 - ratio) / (1 - here))
        torch.testing.assert_close(x_u, mean + deviation * torch.randn(x_t.shape, generator=generator))
    # The last step drew nothing.
    drawn = generator.get_state()
    generator.set_state(state)
    ddpm(smooth_model, x_T, schedule, steps, generator=generator)
    assert torch.equal(generator.get_state(), drawn)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bernoulli_frequency(name, steps, zero_snr):
    p, count = 0.3, 20_000
    schedule = NoiseSchedule("cosine", T, zero_snr)
    generator = torch.Generator().manual_seed(steps)
    x_T = torch.randn(count, 1, generator=generator)
    kwargs = {"generator": generator} if name == "ddpm" else {}
    samples = SAMPLERS[name](BernoulliDenoiser(schedule, p), x_T, schedule, steps, **kwargs)
    assert (samples > 0).float().mean().item() == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / count))
    if steps == 1000:
        assert (samples.abs() > 0.99).float().mean() > 0.99, "samples are crisp, not means"


@pytest.mark.parametrize("p", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_bernoulli_frequency_without_monte_carlo_noise(name, p):
    """Deterministic samplers push the quantiles of x_T forward: the frequency itself, to half a percent."""
    count, schedule = 20_001, NoiseSchedule("cosine", T, zero_terminal_snr=True)
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).view(-1, 1)
    samples = SAMPLERS[name](BernoulliDenoiser(schedule, p), quantiles, schedule, 300)
    assert (samples > 0).float().mean().item() == pytest.approx(p, abs=0.005)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_means_of_samples_from_opposite_noise_vary_less(p):
    """With the exact denoiser the top p of the noise gives 1, so a pair has 2 p ones on average and never two."""
    count, schedule = 20_000, NoiseSchedule("cosine", T, zero_terminal_snr=True)
    starts = [start_of_sample(m, 0) for m in range(4)]
    fields = [sign * seeded_noise((count, 1), seed) for seed, sign in starts]
    samples = torch.stack([ddim(BernoulliDenoiser(schedule, p), x_T, schedule, 300) > 0 for x_T in fields])
    assert samples.float().mean() == pytest.approx(p, abs=0.01)
    variance = samples.float().mean(0).var().item()
    assert variance == pytest.approx(2 * (2 * p) * (1 - 2 * p) / 16, abs=0.002) and variance < p * (1 - p) / 4


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["x0", "v"])
def test_one_step_is_the_posterior_mean(p, kind):
    """At zero terminal SNR x_T holds no label: the exact denoiser returns 2 P - 1 whatever the noise."""
    schedule = NoiseSchedule("cosine", T, zero_terminal_snr=True)
    denoiser = BernoulliDenoiser(schedule, p)

    def v_model(x, t):
        x0 = denoiser(x, t).float()
        return target("v", x0, to_eps(x0, x, t, schedule, "x0"), t, schedule)

    x_T = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    read_out = one_step(denoiser if kind == "x0" else v_model, x_T, schedule, kind=kind)
    torch.testing.assert_close((read_out + 1) / 2, torch.full((500, 1), p), rtol=0, atol=1e-6)
