"""Gaussian noise that is the same everywhere: on every device, in every tile, and, if wanted, in every mirror pass.

Samples of one image come in pairs that start from opposite noise: negatively correlated, hence a better mean and more
different alternatives from as many samples, each of which is drawn from the same distribution as before (Jia et al.,
Antithetic Noise in Diffusion Models, arXiv 2506.06185).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian_noise(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """Standard normal float32 noise, symmetric under flips of `mirror_axes`.

    Args:
        shape: of the result.
        generator: drawn on the generator's own device, then moved; `None` draws from `device`'s global generator.
        device: of the result; default CPU.
        mirror_axes: dimensions of `shape`, counted as `torch.flip` counts them. One half is drawn (with the middle
            plane, if the length is odd) and reflected: each voxel stays standard normal, mirror images are equal.
    Raises:
        ValueError: an axis occurs twice or is outside of `shape`.
    """
    drawn = list(shape)
    axes = [axis % len(drawn) for axis in mirror_axes if -len(drawn) <= axis < len(drawn)]
    if len(set(axes)) != len(mirror_axes):
        raise ValueError(f"mirror_axes must be distinct dimensions of the shape {tuple(shape)}, got {mirror_axes}")
    for axis in axes:
        drawn[axis] = (drawn[axis] + 1) // 2
    source = device if generator is None else generator.device
    noise = torch.randn(drawn, generator=generator, device=source, dtype=torch.float32).to(device or "cpu")
    for axis in axes:
        odd = shape[axis] % 2
        reflected = noise.flip(axis).narrow(axis, odd, noise.shape[axis] - odd)
        noise = torch.cat([noise, reflected], dim=axis)
    return noise


def seeded_noise(
    shape: Sequence[int],
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    mirror_axes: Sequence[int] = (),
) -> Tensor:
    """Standard normal noise fixed by `shape`, `seed` and `mirror_axes` alone.

    Drawn on the CPU by a generator of its own, hence bit-identical on every device and call, and the global random
    state is left as it was. `mirror_axes` as in `gaussian_noise`: with nnU-Net's mirrored axes (its axis i is
    dimension i + 2), a flipped pass sees exactly the flipped noise.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return gaussian_noise(shape, generator=generator, device="cpu", mirror_axes=mirror_axes).to(device, dtype)


def start_of_sample(sample: int, seed: int) -> tuple[int, int]:
    """Seed and sign of the noise that sample m = 0, 1, ... starts from: N, -N, N', -N', ..."""
    return seed + sample // 2, -1 if sample % 2 else 1
