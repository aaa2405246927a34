"""Moments of the ensemble against members that are kept and averaged by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.inference.ensemble import Ensemble, TileEnsemble, mean_pairwise_dice
from nnunet_diffext.inference.members import NoiseFields
from nnunet_diffext.inference.sliding import Tile
from nnunet_diffext.networks.sampling import Sampling

SHAPE = (5, 6, 4)
WHERE = (slice(None),) * 4


class Noisy(torch.nn.Module):
    """Members that differ: logits are fixed per voxel, noise and mirroring change them."""

    def __init__(self, heads: int, regions: bool) -> None:
        super().__init__()
        self.logits, self.regions = torch.randn(1, heads, *SHAPE, generator=torch.Generator().manual_seed(1)), regions

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 2 * self.logits + image

    def sample(self, image, noise, *, steps, sampler, seed):
        logits = self(image) + noise
        return logits.sigmoid() if self.regions else logits.softmax(1)


def nonlinearity(regions: bool):
    return torch.sigmoid if regions else (lambda x: x.softmax(0))


def predict(regions: bool, samples: int, mirrors: list[tuple[int, ...]], **options) -> tuple[Ensemble, torch.Tensor]:
    """The ensemble of a single tile, and its members ``(N, K, *)`` made by hand."""
    heads, image = (2 if regions else 3), torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(2))
    network, noise = Noisy(heads, regions), NoiseFields(heads, SHAPE, samples)
    tiles = TileEnsemble(
        network, LabelSpace(heads, regions), nonlinearity(regions), mirrors=mirrors,
        sampling=Sampling(samples=samples), noise=noise, **options,
    )  # fmt: skip
    maps, totals = tiles(Tile(image, WHERE, torch.ones(SHAPE)))
    assert maps.shape[0] == tiles.channels
    members = []
    for axes in mirrors:
        crops = [noise.crop(m, WHERE).flip(axes) for m in range(samples)] or [0]
        logits = [network(image.flip(axes)) + crop for crop in crops]
        members += [nonlinearity(regions)(x[0]).flip([a - 1 for a in axes]) for x in logits]
    return tiles.finish(maps, totals, 1), torch.stack(members)


def entropy(p: np.ndarray, regions: bool) -> np.ndarray:
    """By the textbook, float64: ``(..., K, *)`` -> ``(..., *)``."""
    p = p.astype(np.float64)
    if regions:
        return (-(p * np.log(p) + (1 - p) * np.log(1 - p))).mean(-4) / math.log(2)
    return -(p * np.log(p)).sum(-4) / math.log(p.shape[-4])


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(("samples", "mirrors"), [(0, [(), (2,), (2, 4)]), (3, [()]), (4, [(), (3,)])])
def test_all_maps_against_kept_members(regions: bool, samples: int, mirrors: list[tuple[int, ...]]) -> None:
    found, members = predict(regions, samples, mirrors, second_moment=True, keep_samples=samples > 0)
    members = members.numpy().astype(np.float64)
    mean = members.mean(0)
    assert found.members == len(members)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-6)
    np.testing.assert_allclose(found.entropy, entropy(mean, regions), atol=1e-5)
    information = entropy(mean, regions) - entropy(members, regions).mean(0)
    np.testing.assert_allclose(found.mutual_information, information, atol=1e-5)
    np.testing.assert_allclose(found.variance, members.var(0).sum(0), atol=1e-6)
    assert found.mutual_information.min() >= 0 and found.mutual_information.max() > 0.01
    if samples:
        by_sample = members.reshape(len(mirrors), samples, *mean.shape).mean(0)
        np.testing.assert_allclose(found.samples, by_sample, atol=1e-6)


def test_an_average_of_logits_would_be_seen() -> None:
    found, members = predict(False, 4, [()])
    logits = members.log().mean(0).softmax(0).numpy()
    assert np.abs(found.probabilities - logits).max() > 0.02


@pytest.mark.parametrize("samples", [0, 1])
def test_a_single_member_disagrees_with_nobody(samples: int) -> None:
    found, _ = predict(False, samples, [()], second_moment=True)
    assert found.members == 1 and not found.mutual_information.any() and not found.variance.any()
    assert found.entropy.max() > 0.1 and math.isnan(found.agreement)


@pytest.mark.parametrize("regions", [False, True])
def test_agreement_is_the_mean_dice_of_all_pairs_and_labels(regions: bool) -> None:
    found, members = predict(regions, 4, [()])
    if regions:
        masks = (members > 0.5).numpy()
    else:
        masks = np.stack([(members.argmax(1) == k).numpy() for k in (1, 2)], 1)
    dice = [
        2 * (masks[i, k] & masks[j, k]).sum() / (masks[i, k].sum() + masks[j, k].sum())
        for i in range(4) for j in range(i) for k in range(2)
    ]  # fmt: skip
    assert found.agreement == pytest.approx(np.mean(dice), abs=1e-6)


def test_labels_that_nobody_predicts_do_not_count() -> None:
    table = torch.tensor([[[4.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert mean_pairwise_dice(table) == pytest.approx(0.5)
    assert math.isnan(mean_pairwise_dice(table[1:]))
