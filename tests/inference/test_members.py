"""Members of the ensemble: noise, mirrored passes, and what a sampling network is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_diffext.diffusion import seeded_noise
from nnunet_diffext.inference.members import (
    NoiseFields,
    mirror_combinations,
    resolve_sampling,
    tile_members,
)
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.sliding import tile_positions
from nnunet_diffext.networks.sampling import Sampling


class Recorder(torch.nn.Module):
    """Returns image + noise, so that flips can be followed, and remembers its calls."""

    default_samples, default_steps, default_sampler = 4, 7, "dpm++"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, int, int, str]] = []

    def sample(self, image, noise, *, steps, sampler, seed):
        self.calls.append((image, seed, steps, sampler))
        return image + noise


def test_a_field_is_the_seeded_noise_of_the_whole_volume_and_tiles_agree_on_it() -> None:
    volume, patch = (10, 12, 9), (6, 8, 6)
    fields = NoiseFields(2, volume, samples=5, seed=5)
    wholes = [seeded_noise((1, 2, *volume), seed) for seed in (5, 6, 7)]
    for index, whole in enumerate((wholes[0], -wholes[0], wholes[1], -wholes[1], wholes[2])):
        for where in tile_positions(volume, patch, 0.5):
            assert torch.equal(fields.crop(index, where), whole[(slice(None), *where)])
    assert abs(float(fields.crop(0, (slice(None),) * 4).std()) - 1) < 0.05


def test_fields_leave_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fields = NoiseFields(1, (4, 4), samples=2)
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []
    del fields
    assert list(tmp_path.iterdir()) == []


def test_mirror_combinations() -> None:
    assert mirror_combinations(None) == [()]
    assert mirror_combinations((0, 2)) == [(), (2,), (4,), (2, 4)]
    assert len(mirror_combinations((0, 1, 2))) == 8


def test_noise_is_flipped_with_the_image_and_samples_share_one_image() -> None:
    network, image = Recorder(), torch.randn(1, 1, 4, 6)
    noise = NoiseFields(1, (8, 6), samples=2, seed=3)
    where = (slice(None), slice(2, 6), slice(0, 6))
    sampling = Sampling(samples=2, steps=5, sampler="ddpm", seed=3)
    options = {"mirrors": [(), (2,), (2, 3)], "sampling": sampling, "noise": noise, "probabilities": torch.sigmoid}
    found = list(tile_members(network, image, where, **options))
    assert [m for m, _ in found] == [0, 1] * 3
    for m, p in found:  # every mirrored pass, flipped back, is the same sample
        assert torch.equal(p, (image + noise.crop(m, where))[0])
    assert [call[1:] for call in network.calls] == [(3, 5, "ddpm"), (4, 5, "ddpm")] * 3
    for first, second in zip(network.calls[::2], network.calls[1::2], strict=True):
        assert first[0] is second[0], "the network could not keep what depends on the image"


def test_settings_come_from_the_network_unless_given() -> None:
    network = Recorder()
    assert resolve_sampling(network) == Sampling(samples=4, steps=7, sampler="dpm++")
    assert resolve_sampling(network, 2, 3, "ddim", 9) == Sampling(samples=2, steps=3, sampler="ddim", seed=9)
    assert resolve_sampling(network, 0).samples == 0
    network.default_samples = 0
    assert resolve_sampling(network).samples == 0
    assert resolve_sampling(network, steps=9) == Sampling(samples=1, steps=9, sampler="dpm++")
    assert resolve_sampling(torch.nn.Identity()).samples == 0
    assert resolve_sampling(Recorder(), steps=1).samples == 1, "one step gives the same answer for all four"


class OneStep(Recorder):
    """As the diffusion networks are by default: the mean of all samples in one step."""

    default_samples, default_steps = 0, 1

    def __init__(self, timesteps: int = 1000) -> None:
        super().__init__()
        self.schedule = SimpleNamespace(timesteps=timesteps)


def test_samples_of_a_one_step_model_get_several_steps() -> None:
    assert resolve_sampling(OneStep()).samples == 0
    assert resolve_sampling(OneStep(), 4) == Sampling(samples=4, steps=10, sampler="dpm++")
    assert resolve_sampling(OneStep(), sampler="ddpm") == Sampling(samples=1, steps=10, sampler="ddpm")
    assert resolve_sampling(OneStep(), 4, 30).steps == 30
    assert resolve_sampling(OneStep(), 1, 1) == Sampling(samples=1, steps=1, sampler="dpm++")
    assert resolve_sampling(OneStep(timesteps=4), 2).steps == 4


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (torch.nn.Identity(), {"samples": 3}, "Identity does not sample"),
        (torch.nn.Identity(), {"sampler": "ddim"}, "does not sample"),
        (Recorder(), {"samples": -1}, "0 or more"),
        (Recorder(), {"steps": 0}, "1 or more"),
        (Recorder(), {"samples": 0, "steps": 5}, "leave out -steps"),
        (Recorder(), {"samples": 3, "steps": 1}, "-steps 1 gives the same answer for every sample.*-steps 10"),
        (OneStep(), {"samples": 3, "steps": 1}, "Leave out -samples, or"),
        (OneStep(), {"samples": 2, "steps": 2000}, "-steps must be at most 1000.*got 2000"),
    ],
)
def test_settings_that_cannot_work(network: torch.nn.Module, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sampling(network, **arguments)


def test_samples_of_a_model_are_reproducible_and_averaged(sampling: Path, images: Path) -> None:
    file = [str(images / "case_000_0000.nii.gz")]
    predictor = Predictor(sampling, (0, 1), samples=3, steps=2)
    assert predictor.members == 2 * 4 * 3
    first = predictor.predict_case(file, variance=True, samples=True)
    again = predictor.predict_case(file)
    assert np.array_equal(first["probabilities"], again["probabilities"]), "other flags change the prediction"
    assert len(first["samples"]) == 3 and not np.array_equal(first["samples"][0], first["samples"][1])
    assert 0 < first["quality"]["agreement"] < 1
    assert first["mutual_information"].max() > 0.01 and first["variance"].max() > 0.01
    other = Predictor(sampling, (0, 1), samples=3, steps=2, seed=100).predict_case(file)
    assert not np.allclose(first["probabilities"], other["probabilities"], atol=1e-3)


def test_sample_m_does_not_depend_on_how_many_are_drawn(sampling: Path, images: Path) -> None:
    file = [str(images / "case_000_0000.nii.gz")]
    three = Predictor(sampling, (0,), samples=3, mirroring=False).predict_case(file, samples=True)["samples"]
    last = Predictor(sampling, (0,), samples=1, seed=1, mirroring=False).predict_case(file)
    assert np.array_equal(three[2], last["segmentation"])


def test_overlapping_tiles_continue_the_same_sample(sampling: Path) -> None:
    """The tiny network moves logits by the noise: were it drawn per tile, the overlap would average it away."""
    overlapping = Predictor(sampling, (0,), samples=1, mirroring=False, step_size=0.25)
    noise_free = Predictor(sampling, (0,), samples=0, mirroring=False, step_size=0.25)
    data = np.random.default_rng(0).normal(size=(1, 20, 24, 24)).astype(np.float32)
    p, q = (np.log(x.predict_preprocessed(data).probabilities) for x in (overlapping, noise_free))
    moved = (p[1] - p[0]) - (q[1] - q[0])
    noise = seeded_noise((1, 3, 20, 24, 24), 0)[0].numpy()
    correlation = np.corrcoef(moved.ravel(), (noise[1] - noise[0]).ravel())[0, 1]
    assert correlation > 0.95
