"""Few-step samplers as pure functions: noise in, data out.

`model(x_t, t)` gets float32 `x_t` `(B, K, *)` and int64 `t` `(B,)`, returns a prediction of the given `kind` in the
shape of `x_t`, and is called once per step under the caller's autocast and grad mode. A step t -> u is always

    x_u = a x0_hat + b x_t + s noise

with scalars a, b, s computed in double precision and applied to float32 tensors outside autocast. u is the next entry
of the realised list of timesteps, never `t - T // steps`; the last step returns x0_hat itself and adds no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .noise import gaussian_noise
from .parameterization import PredictionKind, to_x0
from .schedules import NoiseSchedule, autocast_off

Model = Callable[[Tensor, Tensor], Tensor]
#: called after every model call with (step, t, x_t, x0_hat)
Callback = Callable[[int, int, Tensor, Tensor], None]


def trailing_timesteps(timesteps: int, steps: int, power: float = 1.0) -> list[int]:
    """`steps` indices, strictly decreasing from T-1 ("trailing" of Lin et al. 2024, table 2).

    Starting at T-1 matters: sampling starts from pure noise, and only at T-1 was the network shown that.

    Args:
        timesteps: T.
        steps: S.
        power: 1: evenly spaced. Larger: t_k = T (1 - (k / S)^power) - 1, dense near T, where it is decided which
            large structures there are.
    Raises:
        ValueError: `steps` is not in 1 .. `timesteps`, or `power` is less than 1.

    >>> trailing_timesteps(1000, 4)
    [999, 749, 499, 249]
    >>> trailing_timesteps(1000, 4, power=3)
    [999, 983, 874, 577]
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"the number of sampling steps must lie in 1 .. {timesteps} (the schedule's T), got {steps}")
    if power < 1:
        raise ValueError(f"power must be at least 1 (evenly spaced), got {power}")
    if power == 1:  # round(T k / S) - 1 in integers; halves go up, so that the list stays strictly monotone
        return [(2 * timesteps * k + steps) // (2 * steps) - 1 for k in range(steps, 0, -1)]
    times = [timesteps - 1]
    for k in range(1, steps):
        times.append(min(times[-1] - 1, round(timesteps * (1 - (k / steps) ** power)) - 1))
    return times


def transitions(schedule: NoiseSchedule, steps: int, power: float = 1.0) -> list[tuple[int, int | None]]:
    """Pairs (t, u) of the realised list; the last u is None, clean data."""
    times = trailing_timesteps(schedule.timesteps, steps, power)
    return list(zip(times, [*times[1:], None], strict=True))


def denoise(model: Model, x: Tensor, t: int, schedule: NoiseSchedule, kind: PredictionKind) -> Tensor:
    """The model's estimate of x_0, float32 `(B, K, *)`, from `x` at timestep `t`; arguments as in `ddim`."""
    batch_t = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
    return to_x0(model(x, batch_t), x, batch_t, schedule, kind)


def ddim_coefficients(schedule: NoiseSchedule, t: int, u: int, eta: float) -> tuple[float, float, float]:
    """a, b, s of a DDIM step (Song et al. 2021, eq. 12 and 16), eps eliminated by x_t = alpha x0 + sigma eps."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_u, sigma_u = schedule.alpha_sigma(u)
    s = eta * (sigma_u / sigma_t) * math.sqrt(1 - (alpha_t / alpha_u) ** 2)
    b = math.sqrt(max(sigma_u**2 - s**2, 0.0)) / sigma_t
    return alpha_u - b * alpha_t, b, s


def ddim(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    power: float = 1.0,
    kind: PredictionKind = "x0",
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    mirror_axes: Sequence[int] = (),
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021): deterministic at `eta=0`, ancestral (DDPM) sampling at `eta=1`.

    Args:
        model: see the module's docstring; `steps` calls.
        x_T: `(B, K, *)` standard normal noise.
        steps: 1 .. T.
        power: spacing of the steps, see `trailing_timesteps`.
        kind: what the model predicts.
        generator: of the noise for `eta > 0`; a CPU generator gives the same noise on every device.
        mirror_axes: make that noise symmetric, see `noise.gaussian_noise`.
        callback: see `Callback`.
    Returns:
        float32 `(B, K, *)`, the last x0_hat. Not clipped.
    Raises:
        ValueError: `steps`, `power`, `eta` or `kind` out of range, or a model output of another shape.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in 0 .. 1 (0 deterministic, 1 DDPM), got {eta}")
    x = x_T.float()
    for step, (t, u) in enumerate(transitions(schedule, steps, power)):
        x0 = denoise(model, x, t, schedule, kind)
        if callback is not None:
            callback(step, t, x, x0)
        if u is None:
            break
        a, b, s = ddim_coefficients(schedule, t, u, eta)
        with autocast_off(x.device):
            x = a * x0 + b * x
            if s > 0:
                x = x + s * gaussian_noise(x.shape, generator=generator, device=x.device, mirror_axes=mirror_axes)
    return x0


def ddpm(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    power: float = 1.0,
    kind: PredictionKind = "x0",
    generator: torch.Generator | None = None,
    mirror_axes: Sequence[int] = (),
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, eq. 6-7) on a strided list: the exact posterior q(x_u | x_t, x0_hat).

    With alpha_{t|u} = alpha_bar_t / alpha_bar_u,

        mean = sqrt(alpha_bar_u) (1 - alpha_{t|u}) / (1 - alpha_bar_t) x0_hat
             + sqrt(alpha_{t|u}) (1 - alpha_bar_u) / (1 - alpha_bar_t) x_t
        var  = (1 - alpha_bar_u) (1 - alpha_{t|u}) / (1 - alpha_bar_t)

    which is DDIM's step at eta = 1 (Song et al. 2021, section 4.1). Arguments, result and errors as in `ddim`.
    """
    return ddim(
        model,
        x_T,
        schedule,
        steps,
        power=power,
        kind=kind,
        eta=1.0,
        generator=generator,
        mirror_axes=mirror_axes,
        callback=callback,
    )


def dpm_solver_pp_2m(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    *,
    power: float = 1.0,
    kind: PredictionKind = "x0",
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): deterministic, second order, data prediction.

    With lambda = log(alpha / sigma) and h = lambda_u - lambda_t,

        x_u = sigma_u / sigma_t x_t + (alpha_u - alpha_t sigma_u / sigma_t) D
        D   = x0_hat + h / (2 h_previous) (x0_hat - x0_hat_previous)

    The form without exp(-h) holds for lambda_t = -inf too, i.e. at the first step with zero terminal SNR; there
    h_previous = inf makes the second step first order. The last step (lambda_u = inf) is first order: x0_hat itself.
    Arguments, result and errors as in `ddim`.
    """
    x = x_T.float()
    previous_x0, previous_h = None, math.inf
    for step, (t, u) in enumerate(transitions(schedule, steps, power)):
        x0 = denoise(model, x, t, schedule, kind)
        if callback is not None:
            callback(step, t, x, x0)
        if u is None:
            break
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha_u, sigma_u = schedule.alpha_sigma(u)
        h = math.inf if alpha_t == 0 else math.log(alpha_u / sigma_u) - math.log(alpha_t / sigma_t)
        b = sigma_u / sigma_t
        with autocast_off(x.device):
            data = x0 if previous_x0 is None else x0 + h / (2 * previous_h) * (x0 - previous_x0)
            x = (alpha_u - b * alpha_t) * data + b * x
        previous_x0, previous_h = x0, h
    return x0


def one_step(
    model: Model,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    kind: PredictionKind = "x0",
    callback: Callback | None = None,
) -> Tensor:
    """One model call at t = T-1: for an MSE-trained network the posterior mean E[x_0 | image], voxel by voxel."""
    return ddim(model, x_T, schedule, 1, kind=kind, callback=callback)
