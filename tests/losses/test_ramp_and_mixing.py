"""The ramp of the consistency weight, and the cuboids pasted from one batch into another."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_diffext.data.mixing import paste, random_cuboid
from nnunet_diffext.losses.schedules import gaussian_ramp


@pytest.mark.parametrize(
    ("progress", "length", "expected"),
    [
        (0.0, 0.25, math.exp(-5)),
        (0.125, 0.25, math.exp(-1.25)),
        (0.25, 0.25, 1.0),
        (0.9, 0.25, 1.0),
        (0.5, 1.0, math.exp(-1.25)),
        (0.0, 0.0, 1.0),
        (-1.0, 0.5, math.exp(-5)),
    ],
)
def test_gaussian_ramp(progress: float, length: float, expected: float) -> None:
    assert gaussian_ramp(progress, length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("patch", [(10, 12), (6, 10, 12)])
@pytest.mark.parametrize("fraction", [0.5, 2 / 3, 1.0, 0.01])
def test_cuboid_is_one_box_of_the_right_size(patch: tuple[int, ...], fraction: float) -> None:
    torch.manual_seed(0)
    masks = random_cuboid(8, patch, fraction)
    assert masks.shape == (8, 1, *patch)
    size = [max(1, round(fraction * s)) for s in patch]
    for mask in masks:
        inside = mask[0].nonzero()
        extent = inside.amax(0) - inside.amin(0) + 1
        assert extent.tolist() == size
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert len(inside) == math.prod(size)  # as many voxels as the bounding box: no holes


def test_cuboids_go_everywhere_each_sample_its_own() -> None:
    torch.manual_seed(0)
    masks = random_cuboid(200, (6, 6), 0.5)
    assert (masks.mean(0) > 0).all()  # the corners included
    starts = {tuple(mask[0].nonzero()[0].tolist()) for mask in masks}
    assert len(starts) == 4 * 4


@pytest.mark.parametrize("patch", [(10, 12), (6, 10, 12)])
def test_pasting_both_ways_keeps_every_voxel_exactly_once(patch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    n = 2 * 3 * math.prod(patch)
    a = torch.arange(n, dtype=torch.float32).view(2, 3, *patch)
    b = a + n
    mask = random_cuboid(2, patch, 2 / 3)
    first, second = paste(a, b, mask), paste(b, a, mask)
    both = torch.cat([first, second])
    assert both.shape == (4, 3, *patch)
    assert torch.equal(both.flatten().sort().values, torch.arange(2 * n, dtype=torch.float32))
    inside = (mask == 1).expand_as(a)
    assert torch.equal(first[inside], a[inside]) and torch.equal(first[~inside], b[~inside])
    assert torch.equal(second[inside], b[inside]) and torch.equal(second[~inside], a[~inside])


def test_pasting_with_a_full_mask_copies() -> None:
    a, b = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    assert torch.equal(paste(a, b, torch.ones(2, 1, 4, 4)), a)
    assert torch.equal(paste(a, b, torch.zeros(2, 1, 4, 4)), b)
