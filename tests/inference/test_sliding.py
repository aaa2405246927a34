"""The sliding window: every voxel is averaged with weights that sum to one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_model

from nnunet_diffext.inference.model_folder import load_predictor
from nnunet_diffext.inference.sliding import average_over_tiles, tile_positions


@pytest.mark.parametrize(
    ("volume", "patch"), [((20, 24, 24), (16, 16, 16)), ((10, 40, 12), (16, 16, 16)), ((3, 20, 30), (16, 16))]
)
def test_the_average_of_a_map_is_the_map(volume: tuple[int, ...], patch: tuple[int, ...], tmp_path: Path) -> None:
    predictor = load_predictor(make_model(tmp_path, patch=patch), (0,))
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(1, *volume)).astype(np.float32))

    def function(tile):
        return torch.cat([tile.image[0], tile.image[0] ** 2]), tile.share.double().sum()[None]

    maps, totals = average_over_tiles(predictor, data, 2, function)
    torch.testing.assert_close(maps, torch.cat([data, data**2]), rtol=1e-5, atol=1e-5)
    assert float(totals) == pytest.approx(np.prod(volume), rel=1e-5), "every voxel counts once, the padding never"


def test_disagreeing_tiles_are_weighted_by_the_gaussian(tmp_path: Path) -> None:
    predictor = load_predictor(make_model(tmp_path), (0,))
    seen = []

    def function(tile):
        seen.append(tile)
        return torch.full((1, 16, 16, 16), float(len(seen))), torch.zeros(0)

    maps, _ = average_over_tiles(predictor, torch.zeros(1, 24, 16, 16), 1, function)
    line = maps[0, :, 8, 8]
    assert len(seen) == 2 and line[0] == pytest.approx(1) and line[-1] == pytest.approx(2)
    assert (line.diff() >= -1e-6).all() and line[8:16].diff().min() > 1e-4, "it goes over from one tile to the other"
    assert line[12] == pytest.approx(1.5, abs=0.2)


def test_2d_patches_go_through_the_planes() -> None:
    found = list(tile_positions((3, 16, 20), (16, 16), 0.5))
    assert [w[1] for w in found] == [0, 0, 1, 1, 2, 2] and all(len(w) == 4 for w in found)


def test_nan_is_an_error(tmp_path: Path) -> None:
    predictor = load_predictor(make_model(tmp_path), (0,))
    with pytest.raises(ValueError, match="NaN or Inf"):
        average_over_tiles(
            predictor, torch.zeros(1, 16, 16, 16), 1, lambda t: (t.image[0] / t.image[0], torch.zeros(0))
        )


class OutOfMemoryOnce:
    """Runs out of memory in its second tile, as a device does, and then no more."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tile):
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError("out of memory")
        return tile.image[0], torch.ones(1)


def test_a_cpu_has_nowhere_to_go_when_memory_is_short(tmp_path: Path) -> None:
    predictor = load_predictor(make_model(tmp_path), (0,))
    with pytest.raises(torch.OutOfMemoryError):
        average_over_tiles(predictor, torch.zeros(1, 24, 16, 16), 1, OutOfMemoryOnce())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_full_device_falls_back_to_main_memory_and_starts_again(tmp_path: Path) -> None:
    predictor = load_predictor(make_model(tmp_path), (0,), device="cuda")
    data = torch.randn(1, 24, 16, 16)
    maps, totals = average_over_tiles(predictor, data, 1, OutOfMemoryOnce())
    torch.testing.assert_close(maps, data, rtol=1e-4, atol=1e-4)
    assert float(totals) == 2, "tiles of the failed attempt are not counted"
