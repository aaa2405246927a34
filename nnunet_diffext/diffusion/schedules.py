"""Variance-preserving noise schedules.

Notation, here and in the whole package: a timestep `t` is an index 0 .. T-1 (papers count 1 .. T),
`beta_t` the variance of one step, `alpha_bar_t = prod_{i<=t} (1 - beta_i)`, and

    x_t = alpha_t x_0 + sigma_t eps,    alpha_t = sqrt(alpha_bar_t),    sigma_t = sqrt(1 - alpha_bar_t)

(Ho et al. 2020, eq. 4), so `alpha_t**2 + sigma_t**2 = 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn


def linear_betas(timesteps: int, start: float = 1e-4, end: float = 2e-2) -> Tensor:
    """Linear in beta (Ho et al. 2020). Not rescaled with T: below about 500 steps much signal is left at T-1."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64, device="cpu")


def scaled_linear_betas(timesteps: int, start: float = 1.5e-3, end: float = 1.55e-2) -> Tensor:
    """Linear in sqrt(beta), with the limits of latent diffusion (Rombach et al. 2022)."""
    return linear_betas(timesteps, math.sqrt(start), math.sqrt(end)).square()


def cosine_betas(timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)), u = t / T; beta clipped (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    # LEAF's official code: latent diffusion's limits, but linear in beta.
    "latent_linear": partial(linear_betas, start=1.5e-3, end=1.55e-2),
    "cosine": cosine_betas,
}


def betas(name: str, timesteps: int) -> Tensor:
    """Per-step variances of a named schedule: float64 `(T,)` on the CPU.

    Raises:
        ValueError: `name` is not in `SCHEDULES`, or `timesteps < 1`.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if timesteps < 1:
        raise ValueError(f"a noise schedule needs at least 1 timestep, got timesteps={timesteps}")
    return SCHEDULES[name](timesteps)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first is kept (Lin et al. 2024, Alg. 1).

    Args:
        betas: `(T,)`, float64, T >= 2.
    Returns:
        new betas, float64 `(T,)`; the last is exactly 1.
    Raises:
        ValueError: one timestep only, which cannot keep its first value and end at zero.
    """
    if betas.numel() < 2:
        raise ValueError("zero terminal SNR needs at least 2 timesteps; use more, or zero_terminal_snr=False")
    root = (1 - betas.double()).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root.square()
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Context without autocast on `device`: 1/alpha reaches 2e4, and its products overflow in fp16."""
    # The meta device (memory planning, FLOP counts) knows no autocast at all.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class NoiseSchedule(nn.Module):
    """The tables of one schedule.

    Buffers, each `(T,)`: `beta`, `alpha_bar`, `sqrt_alpha_bar` (alpha), `sqrt_one_minus_alpha_bar` (sigma). They are
    made in float64, kept in float32 whatever `.half()` or `.to(dtype)` says, follow the module's device, and are
    not in the state dict: a schedule is fixed by its three arguments.

    Args:
        name: a key of `SCHEDULES`.
        timesteps: T.
        zero_terminal_snr: rescale so that `x_{T-1}` is pure noise; rules out eps-prediction, which is undefined there.
    Raises:
        ValueError: unknown name or too few timesteps.

    >>> NoiseSchedule("cosine", 1000, zero_terminal_snr=True).sqrt_alpha_bar[-1].item()
    0.0
    """

    beta: Tensor
    alpha_bar: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor

    def __init__(self, name: str = "cosine", timesteps: int = 1000, zero_terminal_snr: bool = False) -> None:
        super().__init__()
        self.name = name
        self.timesteps = timesteps
        self.zero_terminal_snr = zero_terminal_snr
        beta = betas(name, timesteps)
        if zero_terminal_snr:
            beta = rescale_zero_terminal_snr(beta)
        # Plain floats are the float64 original: out of reach of casts, and readable without a device synchronisation.
        self._beta = tuple(beta.tolist())
        self._alpha_bar = tuple((1 - beta).cumprod(0).tolist())
        for key, table in self._tables().items():
            self.register_buffer(key, table, persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        alpha_bar = torch.tensor(self._alpha_bar, dtype=torch.float64, device="cpu")
        tables = {
            "beta": torch.tensor(self._beta, dtype=torch.float64, device="cpu"),
            "alpha_bar": alpha_bar,
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        }
        return {key: table.float() for key, table in tables.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseSchedule:
        # Every .to/.half/.cuda/.to_empty comes through here. Take the device it asks for, never dtype or values.
        super()._apply(fn, recurse)
        device = self.alpha_bar.device
        for key, table in self._tables().items():
            self._buffers[key] = table.to(device)
        return self

    def alpha_sigma(self, t: int | None) -> tuple[float, float]:
        """`(alpha_t, sigma_t)` of one timestep in double precision; `t=None` is clean data, (1, 0)."""
        if t is None:
            return 1.0, 0.0
        return math.sqrt(self._alpha_bar[t]), math.sqrt(1 - self._alpha_bar[t])

    def marginal(self, t: Tensor, ndim: int = 1) -> tuple[Tensor, Tensor]:
        """`(alpha_t, sigma_t)` for integer `t` `(B,)`, each float32 `(B, 1, ..., 1)` with `ndim` dimensions."""
        shape = (-1,) + (1,) * (ndim - 1)
        return self.sqrt_alpha_bar[t].view(shape), self.sqrt_one_minus_alpha_bar[t].view(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Forward process x_t = alpha_t x_0 + sigma_t eps (Ho et al. 2020, eq. 4).

        Args:
            x0, noise: `(B, K, *)`, any float dtype.
            t: integer `(B,)` in 0 .. T-1.
        Returns:
            float32 `(B, K, *)`.
        """
        with autocast_off(x0.device):
            alpha, sigma = self.marginal(t, x0.ndim)
            return alpha * x0.float() + sigma * noise.float()

    def extra_repr(self) -> str:
        return f"{self.name!r}, timesteps={self.timesteps}, zero_terminal_snr={self.zero_terminal_snr}"
