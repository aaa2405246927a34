"""From the members of an ensemble to one probability and its uncertainty, without keeping the members.

With members p_i, their mean p and the entropy H (LabelSpace.normalized_entropy: divided by log K, for regions the mean
of binary entropies divided by log 2), per voxel:
  * predictive entropy   H(p)                   all uncertainty
  * mutual information   H(p) - mean_i H(p_i)   what the members disagree about (epistemic); never negative
  * variance             sum_k E p_ik^2 - (E p_ik)^2
Members are mirrored passes x folds x samples. Probabilities, not logits, are averaged. Where tiles overlap, the mean
also runs over them, so mutual information and variance include what the tiles disagree about. A single member disagrees
with nobody: both are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.inference.members import NoiseFields, tile_members
from nnunet_diffext.inference.sliding import Tile
from nnunet_diffext.networks.sampling import Sampling


@dataclass(frozen=True)
class Ensemble:
    """A prediction on the grid of the preprocessed image, float32.

    Attributes:
        probabilities: ``(K, *)`` mean over the members.
        entropy: ``(*)`` predictive entropy, in [0, 1].
        mutual_information: ``(*)`` in [0, 1].
        variance: ``(*)``, or None if it was not asked for.
        samples: ``(M, K, *)`` mean of each sample over mirrored passes and folds, or None if not asked for.
        agreement: mean pairwise Dice of the samples' segmentations; NaN with fewer than two samples, or no foreground.
        members: how many were averaged.
    """

    probabilities: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray
    variance: np.ndarray | None
    samples: np.ndarray | None
    agreement: float
    members: int


class TileEnsemble:
    """What :func:`~nnunet_diffext.inference.sliding.average_over_tiles` averages: the moments of a tile's members.

    Args:
        network: see :mod:`~nnunet_diffext.inference.members`.
        space: heads of the network.
        nonlinearity: logits ``(K, *)`` -> probabilities.
        mirrors: dimensions flipped per pass.
        sampling: samples per pass.
        noise: fields of the samples.
        second_moment: also average p^2, for the variance.
        keep_samples: also average every sample apart.
    """

    def __init__(
        self,
        network: nn.Module,
        space: LabelSpace,
        nonlinearity: Callable[[Tensor], Tensor],
        *,
        mirrors: Sequence[tuple[int, ...]],
        sampling: Sampling,
        noise: NoiseFields | None = None,
        second_moment: bool = False,
        keep_samples: bool = False,
    ) -> None:
        self.network, self.space, self.nonlinearity = network, space, nonlinearity
        self.mirrors, self.sampling, self.noise = mirrors, sampling, noise
        self.second_moment, self.keep_samples = second_moment, keep_samples

    @property
    def channels(self) -> int:
        """Maps per tile: mean p (K), mean entropy (1), mean p^2 (K, if asked for), samples (M K, if asked for)."""
        k = self.space.num_heads
        return k + 1 + k * self.second_moment + k * self.sampling.samples * self.keep_samples

    def __call__(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The maps of a tile, and the co-occurrence ``(K, M, M)`` of the samples' segmentations in it."""
        apart = self.sampling.samples > 1 or self.keep_samples
        mean = entropy = square = 0.0
        samples: list[Tensor | float] = [0.0] * self.sampling.samples
        members = tile_members(
            self.network,
            tile.image,
            tile.where,
            mirrors=self.mirrors,
            sampling=self.sampling,
            noise=self.noise,
            probabilities=self.nonlinearity,
        )
        for m, p in members:
            mean = mean + p
            entropy = entropy + self.space.normalized_entropy(p[None])[0]
            if self.second_moment:
                square = square + p**2
            if apart:
                samples[m] = samples[m] + p
        count = len(self.mirrors) * max(1, self.sampling.samples)
        maps = [mean / count, entropy / count] + ([square / count] if self.second_moment else [])
        drawn = [s / len(self.mirrors) for s in samples] if apart else []
        if self.keep_samples:
            maps += drawn
        return torch.cat(maps), self._cooccurrence(drawn, tile.share)

    def _cooccurrence(self, drawn: list[Tensor], share: Tensor) -> Tensor:
        """``(K, M, M)`` voxels that samples i and j both give to label k, each voxel counted by the tile's share."""
        if len(drawn) < 2:
            return torch.zeros(0)
        hard = self.space.harden(torch.stack(drawn)).flatten(2)
        with torch.autocast(hard.device.type, enabled=False):
            return torch.einsum("ikv,jkv,v->kij", hard, hard, share.flatten().float()).double().cpu()

    def finish(self, maps: Tensor, totals: Tensor, folds: int) -> Ensemble:
        """Maps averaged over tiles and folds ``(channels, *)``, totals summed over both -> the prediction."""
        k, drawn = self.space.num_heads, self.sampling.samples
        members = folds * len(self.mirrors) * max(1, drawn)
        p, expected = maps[:k], maps[k]
        entropy = self.space.normalized_entropy(p[None])[0, 0]
        information = (entropy - expected).clamp(0, 1) if members > 1 else torch.zeros_like(entropy)
        variance = samples = None
        if self.second_moment:
            square = maps[k + 1 : 2 * k + 1]
            variance = (square - p**2).clamp(min=0).sum(0) if members > 1 else torch.zeros_like(entropy)
        if self.keep_samples:
            samples = maps[-k * drawn :].unflatten(0, (drawn, k))
        first = 0 if self.space.regions else 1  # background agrees with itself almost everywhere
        volumes = [None if v is None else v.numpy() for v in (p, entropy, information, variance, samples)]
        return Ensemble(*volumes, agreement=mean_pairwise_dice(totals[first:]), members=members)


def mean_pairwise_dice(cooccurrence: Tensor) -> float:
    """Mean Dice over pairs of samples and labels.

    Args:
        cooccurrence: ``(labels, M, M)``: voxels that samples i and j both give to the label.

    Returns:
        NaN for fewer than two samples. A label that neither of a pair predicts does not count.
    """
    if cooccurrence.ndim != 3 or cooccurrence.shape[-1] < 2:
        return float("nan")
    size = cooccurrence.diagonal(dim1=1, dim2=2)
    dice = 2 * cooccurrence / (size[:, :, None] + size[:, None, :])
    i, j = torch.triu_indices(*dice.shape[1:], offset=1)
    return float(dice[:, i, j].nanmean())
