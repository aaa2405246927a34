"""Samplers and read-outs of residual diffusion by name: noise to an estimate, an estimate to probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_diffext.diffusion import NoiseSchedule, ddim, ddpm, dpm_solver_pp_2m
from nnunet_diffext.diffusion.parameterization import PredictionKind
from nnunet_diffext.diffusion.residual import LITERAL_READINGS, literal_sampler
from nnunet_diffext.diffusion.samplers import Model

SAMPLERS = ("ddim", "ddpm", "dpm++", *LITERAL_READINGS)
WITHOUT_NOISE = ("ddim", "dpm++", "eq5_mean")
"""Samplers that add no noise on the way."""
FEW_STEPS = 10
"""Of the samples of a network whose own prediction is a single step."""
READOUTS = ("heads", "simplex", "softmax")
FLOOR = 1e-4
"""Of probabilities: a prior of exactly zero could not be corrected, and costs infinitely much where it is wrong."""

VOXELS_AT_ONCE = 2**18
"""Samples of one image are drawn in batches of up to so many voxels: passes over small patches leave a GPU idle, and
larger batches leave the caches of a CPU."""

_ON_THE_WAY = 0x5DEECE66
"""Changes a seed: with the same one, the noise of a sampler's first step would be the noise it started from."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How probabilities are drawn: the mean of ``samples`` runs of ``steps`` denoiser evaluations each.

    Samples ``2k`` and ``2k + 1`` start from the noise of ``seed + k`` and its negative; noise on the way is that of
    ``seed + m``. ``samples=0`` asks a network for its deterministic prediction, whatever that is.
    """

    samples: int = 1
    steps: int = 1
    sampler: str = "ddim"
    seed: int = 0

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added on the way. Other than the field that a sample starts from, it begins anew in every
        tile: samples then do not continue from tile to tile."""
        return self.samples > 0 and self.steps > 1 and self.sampler not in WITHOUT_NOISE

    def batches(self, voxels: int, images: int = 1) -> Iterator[range]:
        """Indices of the samples that are drawn at once, for patches of so many voxels and for so many images. Noise on
        the way has a seed per sample."""
        together = 1 if images > 1 or self.adds_noise else max(1, VOXELS_AT_ONCE // voxels)
        for first in range(0, self.samples, together):
            yield range(first, min(first + together, self.samples))


def draw(
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    sampler: str,
    seed: int,
    *,
    power: float = 1.0,
    kind: PredictionKind,
    centre: Tensor | None = None,
) -> Tensor:
    """Estimate of ``u_0`` ``(B, K, *)``, float32. Noise that is added on the way is the same in every mirror pass.

    Args:
        model, noise, steps, power, kind: see :mod:`nnunet_diffext.diffusion.samplers`.
        sampler: one of :data:`SAMPLERS`.
        seed: of the noise on the way.
        centre: ``pi / kappa``, which the literal readings of eq. 5 drift away from; ``None``: zero.
    Raises:
        ValueError: unknown sampler, or steps out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if sampler == "ddim":
        return ddim(model, noise, schedule, steps, power=power, kind=kind)
    if sampler == "dpm++":
        return dpm_solver_pp_2m(model, noise, schedule, steps, power=power, kind=kind)
    generator = torch.Generator().manual_seed(seed ^ _ON_THE_WAY)
    axes = tuple(range(2, noise.ndim))
    if sampler == "ddpm":
        return ddpm(model, noise, schedule, steps, power=power, kind=kind, generator=generator, mirror_axes=axes)
    centre = torch.zeros_like(noise) if centre is None else centre
    return literal_sampler(
        model,
        noise,
        schedule,
        steps,
        centre,
        reading=sampler,
        power=power,
        kind=kind,
        generator=generator,
        mirror_axes=axes,
    )


def project(estimate: Tensor, regions: bool) -> Tensor:
    """Clamped to ``[FLOOR, 1 - FLOOR]``; softmax heads are normalised. ``(B, K, *)``."""
    p = estimate.clamp(FLOOR, 1 - FLOOR)
    return p if regions else p / p.sum(1, keepdim=True)


def soften(estimate: Tensor, tau: float, regions: bool) -> Tensor:
    """Softmax of one-hot-valued estimates over tau (PGRD, II-E); regions: of each against its complement."""
    return ((2 * estimate - 1) / tau).sigmoid() if regions else (estimate / tau).softmax(1)
