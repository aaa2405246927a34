"""Residual diffusion around a prior (PGRD, section II-B), in centred and scaled variables.

With a prior pi and a scale kappa, the state s_t and its centred form u_t are

    s_t = pi + kappa u_t,    u_0 = (y - pi) / kappa,    u_t = sqrt(abar_t) u_0 + sqrt(1 - abar_t) eps

so every schedule, parameterisation and sampler of this package applies to u as it stands; PGRD's eq. 2-4 and 7 hold
with rho_t = abar_t, the *cumulative* product. In s, the DDPM posterior of a step t -> u is

    s_u = A y_hat + B s_t + gamma pi + std noise,    gamma = 1 - A - B = (1 - a) (1 - b) / (1 + a b)

with a = sqrt(abar_t / abar_u), b = sqrt(abar_u). PGRD's eq. 5 drops gamma pi and one bar, and its "DDIM-style" sampler
sets std = 0; eq. 10 shrinks the mean by alpha_t instead of sqrt(alpha_t). These literal readings are kept as documented
curiosities: none of them samples from the distribution that the network was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import gaussian_noise
from .parameterization import PredictionKind
from .samplers import Model, ddim_coefficients, denoise, transitions
from .schedules import NoiseSchedule, autocast_off

LITERAL_READINGS = ("eq5_mean", "eq5_uncentred", "eq5_literal")


class PosteriorStep(NamedTuple):
    """Coefficients of ``s_u = y y_hat + s s_t + prior pi + std noise``, double precision."""

    y: float
    s: float
    prior: float
    std: float


def posterior_step(schedule: NoiseSchedule, t: int, u: int) -> PosteriorStep:
    """DDPM posterior of the process that drifts towards the prior, for any t > u (eq. 5, corrected; CARD's gamma_2).

    Args:
        t, u: timesteps of the realised list, 0 <= u < t < T.
    Raises:
        ValueError: not ``t > u``.
    """
    if not 0 <= u < t:
        raise ValueError(f"a reverse step goes from t to an earlier u >= 0, got t={t}, u={u}")
    y, s, std = ddim_coefficients(schedule, t, u, eta=1.0)
    alpha_t, _ = schedule.alpha_sigma(t)
    alpha_u, _ = schedule.alpha_sigma(u)
    a = alpha_t / alpha_u
    return PosteriorStep(y, s, (1 - a) * (1 - alpha_u) / (1 + a * alpha_u), std)


def literal_sampler(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    prior: Tensor,
    *,
    reading: str,
    power: float = 1.0,
    kind: PredictionKind = "v",
    generator: torch.Generator | None = None,
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """PGRD's eq. 5 taken at its word, in centred variables; biased, for comparison only.

    Args:
        model, x_T, steps, power, kind, generator, mirror_axes: as in :func:`~nnunet_diffext.diffusion.samplers.ddim`.
        prior: ``pi / kappa``, ``(B, K, *)``: what the missing drift towards the prior amounts to.
        reading: ``"eq5_mean"``: the mean of eq. 5 without noise ("a DDIM-style sampler sets sigma_t = 0");
            ``"eq5_uncentred"``: eq. 5 with its noise; ``"eq5_literal"``: also with the bar that is missing in
            ``sqrt(rho_{t-1})``, i.e. with the factor of one step where the cumulative product belongs.
    Returns:
        float32 ``(B, K, *)``, the last estimate of ``u_0``.
    Raises:
        ValueError: unknown reading.
    """
    if reading not in LITERAL_READINGS:
        raise ValueError(f"unknown reading {reading!r} of eq. 5; choose one of {', '.join(LITERAL_READINGS)}")
    x = x_T.float()
    steps_taken = transitions(schedule, steps, power)
    for index, (t, u) in enumerate(steps_taken):
        x0 = denoise(model, x, t, schedule, kind)
        if u is None:
            break
        step = posterior_step(schedule, t, u)
        y, std = step.y, step.std
        if reading == "eq5_literal":
            _, before = steps_taken[index + 1]
            alpha_before, _ = schedule.alpha_sigma(before)
            y = y / alpha_before  # sqrt(abar_u / abar_before) instead of sqrt(abar_u)
        elif reading == "eq5_mean":
            std = 0.0
        with autocast_off(x.device):
            # s = pi + u: y (pi + x0) + s (pi + x) - pi
            x = y * x0 + step.s * x - (1 - y - step.s) * prior
            if std > 0:
                x = x + std * gaussian_noise(x.shape, generator=generator, device=x.device, mirror_axes=mirror_axes)
    return x0


def literal_eq10_marginal(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Mean factor and standard deviation of ``r_t`` under eq. 10 at its word, ``alpha_t r_{t-1} + sqrt(beta_t) eps``.

    Returns:
        ``(mean, std)``, float32 ``(T,)`` each. ``mean^2 + std^2`` is not 1, so eq. 3 and 4 do not invert.
    """
    mean, variance, means, deviations = 1.0, 0.0, [], []
    for beta in schedule.beta.tolist():
        mean *= 1 - beta
        variance = (1 - beta) ** 2 * variance + beta
        means.append(mean)
        deviations.append(math.sqrt(variance))
    return torch.tensor(means, device="cpu"), torch.tensor(deviations, device="cpu")
