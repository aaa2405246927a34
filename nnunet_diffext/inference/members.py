"""The members of a prediction's ensemble: mirrored passes x samples, of every fold.

What a network has to offer:
  * ``network(image)`` in eval mode: logits ``(B, K, *patch)``, whose softmax (sigmoid for regions) is the probability.
  * one that can sample has also ``sample(image, noise, *, steps, sampler, seed)``: probabilities ``(M, K, *patch)`` of
    M samples of one image that start from ``noise (M, K, *patch)`` (``noise_channels`` instead of K, if it has that
    attribute), and the attributes ``default_samples``, ``default_steps`` and ``default_sampler``. All samples of a tile
    are asked for directly one after another with the same image tensor, so the network may keep what depends on the
    image alone; M is 1 where the sampler adds noise of its own, from ``seed``.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import seeded_noise, start_of_sample
from nnunet_diffext.inference.stored import no_space
from nnunet_diffext.networks.sampling import FEW_STEPS, Sampling


def resolve_sampling(
    network: nn.Module,
    samples: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
) -> Sampling:
    """What the user asked for, completed by the network's own defaults (``None``).

    A network that draws no samples by default predicts the mean of all of them in one step. It is asked for samples of
    :data:`FEW_STEPS` steps, because one step gives the same answer for every noise.

    Raises:
        ValueError: a value out of range, several samples of one step, or samples asked of a network that cannot sample.
    """
    if not hasattr(network, "sample"):
        if samples or steps is not None or sampler is not None:
            raise ValueError(
                f"{type(network).__name__} does not sample: it has one deterministic prediction. Leave out -samples, "
                "-steps and -sampler; mirroring and several folds still give an ensemble."
            )
        return Sampling(samples=0, seed=seed)
    if samples == 0 and (steps is not None or sampler is not None):
        raise ValueError("-samples 0 is the deterministic prediction: leave out -steps and -sampler.")
    if steps == 1 and samples is not None and samples > 1:
        raise ValueError(
            f"-steps 1 gives the same answer for every sample, so {samples} samples would agree whatever the model "
            f"does not know. Leave out -samples, or draw them in more steps: -steps {FEW_STEPS}."
        )
    default = getattr(network, "default_samples", 1)
    if samples is None:
        samples = default
        if steps is not None or sampler is not None:  # which the deterministic forward would ignore
            samples = 1 if steps == 1 else max(1, default)
    longest = getattr(getattr(network, "schedule", None), "timesteps", None)
    if steps is None:
        steps = getattr(network, "default_steps", 1)
        if samples and not default:
            steps = min(max(steps, FEW_STEPS), longest or FEW_STEPS)
    sampler = getattr(network, "default_sampler", "ddim") if sampler is None else sampler
    if samples < 0 or steps < 1:
        raise ValueError(f"-samples must be 0 or more and -steps 1 or more; got {samples} samples of {steps} steps.")
    if longest is not None and steps > longest:
        raise ValueError(f"-steps must be at most {longest}, the length of the model's noise schedule; got {steps}.")
    return Sampling(samples=samples, steps=steps, sampler=sampler, seed=seed)


def mirror_combinations(axes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Dimensions of ``(B, C, *patch)`` to flip, one tuple per pass; the first flips nothing.

    Args:
        axes: spatial axes that may be mirrored, counted from 0; ``None`` or none: a single pass.
    """
    shifted = [axis + 2 for axis in axes or ()]
    return list(chain.from_iterable(combinations(shifted, n) for n in range(len(shifted) + 1)))


class NoiseFields:
    """The standard normal field ``(1, K, *volume)`` of every sample over the padded volume: overlapping tiles agree.

    A pair of samples shares one, with opposite signs. Each is drawn whole by :func:`seeded_noise` and kept in a
    temporary file: memory holds one at a time, while it is drawn.

    Args:
        channels: K.
        volume: spatial shape after padding.
        samples: M.
        seed: of the first pair.

    Raises:
        ValueError: the disk of the temporary folder is full.
    """

    def __init__(self, channels: int, volume: Sequence[int], samples: int, seed: int = 0) -> None:
        self._starts = [start_of_sample(m, seed) for m in range(samples)]
        self.shape = (1, channels, *volume)
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="nnunet_diffext_noise_", ignore_cleanup_errors=True)
            self._fields = {n: self._draw(n) for n in dict.fromkeys(n for n, _ in self._starts)}
        except OSError as error:
            raise no_space(error.strerror or error) from error

    def crop(self, index: int, where: tuple[int | slice, ...]) -> Tensor:
        """Noise of sample ``index`` for the tile at ``where`` (an index into ``(C, *volume)``): ``(1, K, *patch)``."""
        seed, sign = self._starts[index]
        return sign * self._fields[seed][(slice(None), *where)]

    def _draw(self, seed: int) -> Tensor:
        size = math.prod(self.shape)
        file = Path(self._folder.name) / f"{seed}.f32"
        with open(file, "wb") as handle:  # reserved first: a full disk is an error here, not a crash while writing
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, 4 * size)
            handle.truncate(4 * size)
        field = torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(self.shape)
        field.copy_(seeded_noise(self.shape, seed))
        with contextlib.suppress(OSError):  # the mapping keeps the data: nothing is left behind after a kill
            file.unlink()
        return field


def tile_members(
    network: nn.Module,
    image: Tensor,
    where: tuple[int | slice, ...],
    *,
    mirrors: Sequence[tuple[int, ...]],
    sampling: Sampling,
    noise: NoiseFields | None,
    probabilities: Callable[[Tensor], Tensor],
) -> Iterator[tuple[int, Tensor]]:
    """Every member's probabilities of one tile, unmirrored.

    Args:
        network: see the module.
        image: ``(1, C, *patch)``.
        where: index of the tile in ``(C, *volume)``, for the noise.
        mirrors: dimensions to flip per pass, see :func:`mirror_combinations`. The noise is flipped with the image.
        sampling: samples per pass.
        noise: its fields; not needed without samples.
        probabilities: logits ``(K, *patch)`` -> probabilities.

    Yields:
        Index of the sample (0 for a deterministic network), float32 ``(K, *patch)``.
    """
    fields = [noise.crop(m, where).to(image.device) for m in range(sampling.samples)] if sampling.samples else []
    for axes in mirrors:
        flipped = image.flip(axes) if axes else image
        undo = tuple(axis - 1 for axis in axes)
        if not sampling.samples:
            yield 0, probabilities(network(flipped)[0].float()).flip(undo)
        for batch in sampling.batches(image[0, 0].numel()):
            start = torch.cat([fields[m] for m in batch]).flip(axes)
            seed = sampling.seed + batch.start
            drawn = network.sample(flipped, start, steps=sampling.steps, sampler=sampling.sampler, seed=seed)
            for m, p in zip(batch, drawn, strict=True):
                yield m, p.float().flip(undo)
