"""Scaling of a denoiser's input and output to unit variance (Karras et al. 2022, table 1), for every prediction kind.

With x_t = alpha x_0 + sigma eps, alpha^2 + sigma^2 = 1 and Var x_0 = s^2, the best linear prediction of the target from
x_t is ``skip x_t``; what is left has variance ``out^2``. A network F on ``into x_t`` has a unit-variance target in

    prediction = skip x_t + out F(into x_t) + mean m

Sparse residuals have s << 1: without the skip, F would mostly have to copy its noise. m is an estimate of x_0 that does
not know x_t; it enters as ``sigma^2 m`` in x_0, that is in full at t = T and not at all at t = 0. With one F (but for
its sign) and one m, the three kinds predict the same x_0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .parameterization import PredictionKind
from .schedules import NoiseSchedule, autocast_off


class Preconditioner(NamedTuple):
    """Factors ``(B, 1, ..., 1)``, float32."""

    into: Tensor
    skip: Tensor
    out: Tensor
    mean: Tensor


def precondition(
    kind: PredictionKind, schedule: NoiseSchedule, t: Tensor, spread: Tensor | float, ndim: int
) -> Preconditioner:
    """Factors for a prediction of ``kind`` at ``t``.

    Args:
        t: integer ``(B,)``.
        spread: s > 0, standard deviation of ``x_0``.
        ndim: dimensions of the tensors they are multiplied with.
    Raises:
        ValueError: unknown kind.
    """
    with autocast_off(t.device):
        alpha, sigma = schedule.marginal(t, ndim)
        variance = (alpha * spread).square() + sigma.square()
        into = variance.rsqrt()
        if kind == "v":
            return Preconditioner(into, alpha * sigma * (1 - spread**2) / variance, spread * into, -sigma)
        if kind == "x0":
            return Preconditioner(into, alpha * spread**2 / variance, spread * sigma * into, sigma.square())
        if kind == "eps":
            return Preconditioner(into, sigma / variance, spread * alpha * into, -alpha * sigma)
        raise ValueError(f"unknown prediction kind {kind!r}; choose one of x0, v, eps")
