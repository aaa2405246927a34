"""Residual diffusion around a prior: the process of eq. 1-4 and 7, its posterior, eq. 5 and 10 taken literally."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffext.diffusion import NoiseSchedule, ddim, ddpm, target, to_eps, to_x0
from nnunet_diffext.diffusion.noise import gaussian_noise
from nnunet_diffext.diffusion.residual import (
    LITERAL_READINGS,
    literal_eq10_marginal,
    literal_sampler,
    posterior_step,
)
from nnunet_diffext.diffusion.schedules import betas, rescale_zero_terminal_snr

SAMPLES = 20_000
COLUMNS = ("ddpm", "ddim", *LITERAL_READINGS)
# Fraction of samples with y = 1 in an independent simulation of 20 000 samples each: prior, truth, steps -> COLUMNS.
TABLE = {
    (0.5, 0.3, 1000): (0.299, 0.306, 0.000, 0.252, 0.397),
    (0.5, 0.3, 300): (0.302, 0.296, 0.000, 0.251, 0.388),
    (0.5, 0.3, 10): (0.266, 0.286, 0.000, 0.217, 0.259),
    (0.9, 0.6, 1000): (0.604, 0.596, 1.000, 0.505, 0.748),
    (0.9, 0.6, 300): (0.597, 0.603, 1.000, 0.504, 0.736),
    (0.9, 0.6, 10): (0.608, 0.612, 1.000, 0.511, 0.586),
    (0.95, 0.9, 300): (0.905, 0.900, 1.000, 0.855, 0.970),
}
ROWS = ((0.5, 0.3), (0.9, 0.6), (0.95, 0.9))


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


class OneVoxel:
    """Exact ``E[y - pi | u_t]`` of a voxel y in {0, 1} with P(y = 1) known; one row of the batch per prior."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule
        self.prior, truth = (column([row[i] for row in ROWS]) for i in (0, 1))
        self.log_odds = truth.logit()

    def __call__(self, u: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(int(t[0]))
        # log N(u; alpha (1 - pi), sigma) - log N(u; -alpha pi, sigma)
        evidence = (u - alpha * (0.5 - self.prior)) * (alpha / sigma**2)
        return (self.log_odds + evidence).sigmoid() - self.prior


def fractions(name: str, steps: int) -> list[float]:
    """Share of the samples that end at y = 1, per row."""
    schedule = NoiseSchedule("cosine", 1000, zero_terminal_snr=True)
    model, generator = OneVoxel(schedule), torch.Generator().manual_seed(1)
    noise = torch.randn(len(ROWS), 1, SAMPLES, generator=generator)
    if name == "ddim":
        last = ddim(model, noise, schedule, steps)
    elif name == "ddpm":
        last = ddpm(model, noise, schedule, steps, generator=generator)
    else:
        prior = model.prior.expand_as(noise)
        last = literal_sampler(model, noise, schedule, steps, prior, reading=name, kind="x0", generator=generator)
    return (last + model.prior > 0.5).float().mean((1, 2)).tolist()


@pytest.mark.parametrize("steps", [1000, 300, 10])
@pytest.mark.parametrize("name", COLUMNS)
def test_bernoulli_table(name: str, steps: int) -> None:
    """Only the centred samplers are calibrated; without noise every sample is the mode."""
    got = fractions(name, steps)
    for (prior, truth), fraction in zip(ROWS, got, strict=True):
        if (prior, truth, steps) in TABLE:
            wanted = TABLE[prior, truth, steps][COLUMNS.index(name)]
            # three standard errors of this run and three of the table's, which has three decimals
            error = 2 * 3 * math.sqrt(wanted * (1 - wanted) / SAMPLES) + 0.0005
            assert fraction == pytest.approx(wanted, abs=error), (prior, truth)
        if name in ("ddim", "ddpm") and steps >= 300:
            assert fraction == pytest.approx(truth, abs=3 * math.sqrt(truth * (1 - truth) / SAMPLES) + 0.002)


def marked_together(kappa: float, steps: int, power: float, voxels: int = 58) -> float:
    """Mean of samples of an object that is marked as a whole with P = 0.3, by its exact denoiser; the prior is 0.02."""
    schedule, low = NoiseSchedule("cosine", 1000, zero_terminal_snr=True), -0.02 / kappa

    def model(u: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(int(t[0]))
        evidence = (u - alpha * (low + 0.5 / kappa)).sum(1, keepdim=True) * alpha / kappa / sigma**2
        return (low + (evidence + math.log(0.3 / 0.7)).sigmoid() / kappa).expand_as(u)

    noise = torch.randn(4000, voxels, generator=torch.Generator().manual_seed(0))
    return float((0.02 + kappa * ddim(model, noise, schedule, steps, power=power)).mean())


@pytest.mark.parametrize(
    ("kappa", "steps", "power", "expected"),
    [
        (0.2, 10, 1, 0.08), (0.2, 30, 1, 0.22), (0.2, 100, 1, 0.28), (1.0, 10, 1, 0.26), (1.0, 100, 1, 0.30),
        (0.2, 5, 3, 0.22), (0.2, 10, 3, 0.26), (0.2, 20, 3, 0.28),
    ],
)  # fmt: skip
def test_few_even_steps_miss_what_is_decided_near_the_last_t(
    kappa: float, steps: int, power: float, expected: float
) -> None:
    """Whether an object is there is decided close to t = T: the closer, the larger it is and the smaller kappa.

    Ten evenly spaced steps then fall to the mode, even with the exact denoiser. The table of docs/pgrd.md.
    """
    assert marked_together(kappa, steps, power) == pytest.approx(expected, abs=0.02)


# ------------------------------------------------------------------ coefficients
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_gamma_in_closed_form(name: str, zero_snr: bool) -> None:
    """``gamma = 1 - A - B`` for every pair, which is CARD's gamma_2 as well."""
    schedule = NoiseSchedule(name, 100, zero_snr)
    for t in range(1, 100):
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        for u in range(t):
            step = posterior_step(schedule, t, u)
            alpha_u, _ = schedule.alpha_sigma(u)
            assert step.prior == pytest.approx(1 - step.y - step.s, abs=1e-12)
            card = 1 + (alpha_t - 1) * (alpha_t / alpha_u + alpha_u) / sigma_t**2
            assert step.prior == pytest.approx(card, abs=1e-12)


def test_gamma_of_some_steps() -> None:
    schedule = NoiseSchedule("cosine", 1000)
    wanted = {(500, 499): "0.0003", (999, 998): "0.97", (999, 899): "0.84", (500, 400): "0.015"}
    for (t, u), gamma in wanted.items():
        assert f"{posterior_step(schedule, t, u).prior:.{len(gamma) - 2}f}" == gamma


@pytest.mark.parametrize("zero_snr", [False, True])
def test_stride_one_gives_the_textbook_table(zero_snr: bool) -> None:
    schedule, beta = NoiseSchedule("cosine", 1000, zero_snr), betas("cosine", 1000)
    beta = rescale_zero_terminal_snr(beta) if zero_snr else beta
    bar = (1 - beta).cumprod(0)
    before, beta, now = bar[:-1], beta[1:], bar[1:]
    expected = torch.stack(
        [
            before.sqrt() * beta / (1 - now),
            (1 - beta).sqrt() * (1 - before) / (1 - now),
            (beta * (1 - before) / (1 - now)).sqrt(),
        ]
    )
    steps = [posterior_step(schedule, t, t - 1) for t in range(1, 1000)]
    got = torch.tensor([(s.y, s.s, s.std) for s in steps], dtype=torch.float64).T
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 0.2])
def test_posterior_in_s_is_the_ddpm_step_in_u(kappa: float) -> None:
    """The ordinary sampler, applied to ``u = (s - pi) / kappa``, drifts towards the prior by gamma."""
    schedule = NoiseSchedule("cosine", 1000, True)
    generator = torch.Generator().manual_seed(0)
    prior, y_hat, noise = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    path: list[tuple[int, Tensor]] = []
    ddpm(
        lambda u, t: (y_hat - prior) / kappa, noise, schedule, 4, generator=torch.Generator().manual_seed(7),
        callback=lambda step, t, u, u0: path.append((t, prior + kappa * u)),
    )  # fmt: skip
    on_the_way = torch.Generator().manual_seed(7)
    for (t, s_t), (u, s_u) in zip(path, path[1:], strict=False):
        c = posterior_step(schedule, t, u)
        eps = gaussian_noise(s_t.shape, generator=on_the_way)
        expected = c.y * y_hat + c.s * s_t + c.prior * prior + kappa * c.std * eps
        torch.testing.assert_close(s_u, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("t", "u"), [(3, 3), (2, 5), (4, -1)])
def test_a_reverse_step_goes_back(t: int, u: int) -> None:
    with pytest.raises(ValueError, match=f"got t={t}, u={u}"):
        posterior_step(NoiseSchedule(), t, u)


# ------------------------------------------------------------------ forward process
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(("y", "prior", "kappa"), [(1.0, 0.3, 1.0), (0.0, 0.8, 0.2)])
def test_kernel_iterated_gives_the_marginal(y: float, prior: float, kappa: float, zero_snr: bool) -> None:
    """Eq. 1 with ``sqrt(alpha_t)`` per step and variance ``kappa^2 beta_t`` gives eq. 7 with ``abar_t``."""
    steps, n = 100, 50_000
    schedule, generator = NoiseSchedule("cosine", steps, zero_snr), torch.Generator().manual_seed(2)
    s = torch.full((n,), y)
    for t in range(steps):
        beta = float(schedule.beta[t])
        root = math.sqrt(1 - beta)
        s = root * s + (1 - root) * prior + kappa * math.sqrt(beta) * torch.randn(n, generator=generator)
        if t in (0, steps // 4, steps // 2, steps - 1):
            alpha, sigma = schedule.alpha_sigma(t)
            mean, std = alpha * y + (1 - alpha) * prior, kappa * sigma
            assert float(s.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(n))
            assert float(s.var()) == pytest.approx(std**2, rel=4 * math.sqrt(2 / n))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_velocity_inverts_at_every_t(zero_snr: bool) -> None:
    """Eq. 3 and 4 in fp32, to 1e-5."""
    schedule, t = NoiseSchedule("cosine", 1000, zero_snr), torch.arange(1000)
    r0, eps = (torch.randn(1000, 2, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    r_t, v = schedule.add_noise(r0, eps, t), target("v", r0, eps, t, schedule)
    rho = schedule.alpha_bar.view(-1, 1, 1)
    torch.testing.assert_close(v, rho.sqrt() * eps - (1 - rho).sqrt() * r0, atol=1e-5, rtol=0)
    torch.testing.assert_close(to_x0(v, r_t, t, schedule, "v"), r0, atol=1e-5, rtol=0)
    torch.testing.assert_close(to_eps(v, r_t, t, schedule, "v"), eps, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ the paper at its word
@pytest.mark.parametrize(("t", "mean", "std"), [(499, 0.494, 0.615), (899, 0.024, 0.710)])
def test_literal_eq10_marginal(t: int, mean: float, std: float) -> None:
    means, deviations = literal_eq10_marginal(NoiseSchedule("cosine", 1000))
    assert float(means[t]) == pytest.approx(mean, abs=6e-4)
    assert float(deviations[t]) == pytest.approx(std, abs=6e-4)
    assert float(means[t] ** 2 + deviations[t] ** 2) < 0.7, "not on the unit circle: eq. 3-4 do not invert"


def test_literal_eq10_is_what_its_kernel_does() -> None:
    schedule, n = NoiseSchedule("cosine", 50), 50_000
    means, deviations = literal_eq10_marginal(schedule)
    r = torch.ones(n)
    for beta in schedule.beta.tolist()[:40]:
        r = (1 - beta) * r + math.sqrt(beta) * torch.randn(n, generator=torch.Generator().manual_seed(int(1e9 * beta)))
    assert float(r.mean()) == pytest.approx(float(means[39]), abs=4 / math.sqrt(n))
    assert float(r.std()) == pytest.approx(float(deviations[39]), rel=4 / math.sqrt(2 * n))


def test_all_that_eq5_lacks_is_the_drift() -> None:
    """Around a prior of zero, eq. 5 with its bar is the ordinary posterior."""
    schedule, noise = NoiseSchedule("cosine", 1000, True), torch.randn(2, 3, 8, 6)

    def model(u: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(u + t.view(-1, 1, 1, 1) / 1000)

    plain, literal = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = ddpm(model, noise, schedule, 7, generator=plain, mirror_axes=(2, 3))
    got = literal_sampler(
        model, noise, schedule, 7, torch.zeros_like(noise), reading="eq5_uncentred", kind="x0", generator=literal,
        mirror_axes=(2, 3),
    )  # fmt: skip
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unknown_reading() -> None:
    noise = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="'eq6'.*eq5_mean, eq5_uncentred, eq5_literal"):
        literal_sampler(lambda u, t: u, noise, NoiseSchedule(), 2, noise, reading="eq6")
