"""How wrong a prior is near the foreground, and how much corruption makes it as wrong as wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, max_pool3d

from nnunet_diffext.data.corruption import corrupt, matching_strength

BAND = 3
"""Voxels around the foreground in which a prior's errors are measured."""


class PriorError(NamedTuple):
    """How wrong a prior is; NaN where nothing was annotated.

    Attributes:
        band: mean ``|y - pi|`` around the foreground.
        kappa: root mean square of ``y - pi`` there.
        everywhere: the same over all annotated voxels.
    """

    band: float
    kappa: float
    everywhere: float


class ErrorSample:
    """Logits and labels of a few batches, to measure a prior's error on again and again.

    Args:
        as_prior: logits -> pi, ``(B, K, *)`` both.
        regions: every channel is a foreground region; else channel 0 is the background.
    """

    def __init__(self, as_prior: Callable[[Tensor], Tensor], regions: bool) -> None:
        self.as_prior, self.regions = as_prior, regions
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, clean: Tensor, valid: Tensor) -> None:
        """One batch; ``clean`` ``(B, K, *)``, ``valid`` ``(B, 1, *)``."""
        self.batches.append((logits.cpu(), clean.cpu(), valid.cpu()))

    @torch.no_grad()
    def error(self, strength: float = 0.0) -> PriorError:
        """Error of the logits after a corruption, the same one at every call but for its strength."""
        generator = torch.Generator().manual_seed(0)
        absolute = squared = voxels = squared_everywhere = voxels_everywhere = 0.0
        for logits, clean, valid in self.batches:
            residual = clean - self.as_prior(corrupt(logits, strength, generator))
            band = around_foreground(clean, self.regions) * valid
            absolute += float((residual.abs() * band).sum())
            squared += float((residual.square() * band).sum())
            squared_everywhere += float((residual.square() * valid).sum())
            voxels += float(band.sum()) * residual.shape[1]
            voxels_everywhere += float(valid.sum()) * residual.shape[1]
        if not voxels:
            return PriorError(math.nan, math.nan, math.nan)
        everywhere = math.sqrt(squared_everywhere / voxels_everywhere)
        return PriorError(absolute / voxels, math.sqrt(squared / voxels), everywhere)

    def strength_for(self, wanted: float) -> float:
        """Corruption strength at which the mean ``|y - pi|`` is ``wanted``."""
        return matching_strength(lambda strength: self.error(strength).band, wanted)


def around_foreground(clean: Tensor, regions: bool) -> Tensor:
    """1 within :data:`BAND` voxels of the foreground, ``(B, 1, *)``; ``clean`` is one-hot ``(B, K, *)``."""
    foreground = (clean if regions else clean[:, 1:]).amax(1, keepdim=True)
    pool = max_pool3d if clean.ndim == 5 else max_pool2d
    return pool(foreground, 2 * BAND + 1, stride=1, padding=BAND)
