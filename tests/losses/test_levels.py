"""Losses over resolutions: nnU-Net's weights, and targets of coarser levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nnunet_diffext.losses.levels import at_resolution, over_levels


def test_weights_halve_and_are_normalised() -> None:
    target, weight = torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8)
    logits = [torch.full((1, 2, size, size), float(value)) for size, value in ((8, 3), (4, 5), (2, 7))]

    def value(out: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return out.mean()

    assert float(over_levels(value, logits, target, weight)) == pytest.approx((3 + 5 / 2 + 7 / 4) / (1 + 1 / 2 + 1 / 4))
    assert float(over_levels(value, logits[:1], target, weight)) == 3


@pytest.mark.parametrize("size", [(4, 6), (4, 4, 6)])
def test_targets_are_frequencies_among_voxels_with_weight(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, *size), generator=generator)
    target = one_hot(labels, 3).movedim(-1, 1).float()
    weight = torch.rand(2, 1, *size, generator=generator) * (torch.rand(2, 1, *size, generator=generator) < 0.7)
    half = tuple(n // 2 for n in size)
    found, mean = at_resolution(target, weight, half)
    block = (..., *(slice(0, 2) for _ in size))
    known = weight[block] > 0
    expected = (target[block] * known).flatten(2).sum(2) / known.flatten(2).sum(2).clamp_min(1)
    first = (..., *(0 for _ in size))
    torch.testing.assert_close(found[first], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean[first], weight[block].flatten(2).mean(2))


def test_full_resolution_is_left_alone() -> None:
    target, weight = torch.rand(1, 2, 4, 4), torch.rand(1, 1, 4, 4)
    assert at_resolution(target, weight, (4, 4)) == (target, weight)
