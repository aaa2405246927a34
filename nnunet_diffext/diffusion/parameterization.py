"""What the network's output stands for, and how to get from one meaning to another.

With x_t = alpha x_0 + sigma eps and alpha^2 + sigma^2 = 1 (`schedules`), a network predicts one of

    x0     the clean data
    eps    the noise                                   (Ho et al. 2020)
    v      alpha eps - sigma x_0                       (Salimans & Ho 2022, appendix D)

The last is a rotation of (x_0, eps), so it inverts at every t; eps -> x_0 divides by alpha, which magnifies an error at
t = T-1 by 2e4 (cosine) or without limit (zero terminal SNR). All results are float32, computed outside autocast.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from .schedules import NoiseSchedule, autocast_off

PredictionKind = Literal["x0", "v", "eps"]


def _check(kind: str, schedule: NoiseSchedule, **tensors: Tensor) -> None:
    if kind not in get_args(PredictionKind):
        raise ValueError(f"unknown prediction kind {kind!r}; choose one of {', '.join(get_args(PredictionKind))}")
    if kind == "eps" and schedule.zero_terminal_snr:
        raise ValueError(
            f"eps-prediction is undefined for a schedule with zero terminal SNR ({schedule}): x_T holds no x_0 to "
            "recover. Predict 'v' or 'x0', or build the schedule with zero_terminal_snr=False"
        )
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if shapes[0] != shapes[1]:
        # Broadcasting would hide e.g. a network that also outputs variances.
        raise ValueError(f"{' and '.join(tensors)} differ in shape: {shapes[0]} and {shapes[1]}")


def to_x0(prediction: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, kind: PredictionKind) -> Tensor:
    """Clean data implied by a prediction.

    Args:
        prediction, x_t: `(B, K, *)`.
        t: integer `(B,)`.
    Returns:
        float32 `(B, K, *)`.
    Raises:
        ValueError: unknown kind, eps with zero terminal SNR, or different shapes.
    """
    _check(kind, schedule, prediction=prediction, x_t=x_t)
    if kind == "x0":
        return prediction.float()
    with autocast_off(x_t.device):
        alpha, sigma = schedule.marginal(t, x_t.ndim)
        if kind == "v":
            return alpha * x_t.float() - sigma * prediction.float()
        return (x_t.float() - sigma * prediction.float()) / alpha


def to_eps(prediction: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, kind: PredictionKind) -> Tensor:
    """Noise implied by a prediction. Arguments, result and errors as in `to_x0`."""
    _check(kind, schedule, prediction=prediction, x_t=x_t)
    if kind == "eps":
        return prediction.float()
    with autocast_off(x_t.device):
        alpha, sigma = schedule.marginal(t, x_t.ndim)
        if kind == "v":
            return sigma * x_t.float() + alpha * prediction.float()
        return (x_t.float() - alpha * prediction.float()) / sigma


def target(kind: PredictionKind, x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What a network of this kind should output for `x0`, `noise` `(B, K, *)` at `t` `(B,)`. Errors as in `to_x0`."""
    _check(kind, schedule, x0=x0, noise=noise)
    if kind != "v":
        return (x0 if kind == "x0" else noise).float()
    with autocast_off(x0.device):
        alpha, sigma = schedule.marginal(t, x0.ndim)
        return alpha * noise.float() - sigma * x0.float()
