"""Segmentations against nnU-Net's own predictor, on every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import REGIONS, THREE, make_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_diffext.inference.predictor import Predictor
from synthetic import make_raw_dataset

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "labels": ({"labels": THREE}, {}),
    "regions": ({"labels": REGIONS, "seed": 1}, {}),
    "channels": ({"labels": THREE, "channels": 2}, {"channels": 2}),
    "2d": ({"labels": THREE, "patch": (16, 16)}, {}),
    "transposed": ({"labels": THREE, "transpose": (2, 0, 1), "patch": (16, 16, 16)}, {}),
    "cropped": ({"labels": THREE}, {"zero_background": True, "shape": (24, 28, 28)}),
    "resampled": ({"labels": THREE}, {"spacing": (1.25, 0.8, 0.8)}),
}


class GivesProbabilities(nn.Module):
    """Makes nnU-Net average probabilities: they take the place of the logits, scaled up because nnU-Net sums in half
    precision, to which p times the smallest Gaussian weight is 0."""

    def __init__(self, network: nn.Module, regions: bool) -> None:
        super().__init__()
        self.network, self.regions = network, regions

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.network(image)
        return 500 * (logits.sigmoid() - 0.5 if self.regions else logits.softmax(1))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state)


def nnunet_segmentation(
    model: Path,
    files: list[str],
    folds: tuple[int, ...] = (0,),
    *,
    mirroring: bool = False,
    step: float = 0.5,
    probabilities: bool = False,
    previous: str | None = None,
) -> np.ndarray:
    """What nnU-Net's own predictor says; with ``probabilities`` it averages these instead of logits."""
    predictor = nnUNetPredictor(step, use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    if probabilities:
        predictor.network = GivesProbabilities(predictor.network, predictor.label_manager.has_regions)
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images(files)
    earlier = None if previous is None else reader.read_seg(previous)[0]
    return np.asarray(predictor.predict_single_npy_array(image, dict(properties), earlier))


def first_case(tmp_path: Path, **options: Any) -> list[str]:
    options = {"shape": (20, 24, 24), "labels": THREE, **options}
    folder = make_raw_dataset(tmp_path / "raw", 871, "Predict", cases=1, **options)
    return sorted(str(f) for f in (folder / "imagesTr").iterdir())


def margins(p: np.ndarray, regions: bool) -> np.ndarray:
    """How far the decisions ``(K, n)`` are from a tie, in probability."""
    return np.abs(p - 0.5).min(0) if regions else np.diff(np.sort(p, axis=0)[-2:], axis=0)[0]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "resampled"])
def test_a_single_member_with_a_single_tile_is_identical(kind: str, tmp_path: Path) -> None:
    model, data = KINDS[kind]
    size = (32, 32, 32)[: len(model.get("patch", (1, 1, 1)))]
    folder, files = make_model(tmp_path / "results", **{**model, "patch": size}), first_case(tmp_path, **data)
    expected = nnunet_segmentation(folder, files, step=1.0)
    assert len(np.unique(expected)) > 1, "a segmentation of one label shows nothing"
    result = Predictor(folder, (0,), mirroring=False, step_size=1.0).predict_case(files)["segmentation"]
    assert result.dtype == expected.dtype and np.count_nonzero(result != expected) == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "resampled"])
def test_a_single_member_equals_nnunet_where_tiles_agree(kind: str, tmp_path: Path) -> None:
    model, data = KINDS[kind]
    folder, files = make_model(tmp_path / "results", **model, pointwise=True), first_case(tmp_path, **data)
    expected = nnunet_segmentation(folder, files)
    assert len(np.unique(expected)) > 1
    result = Predictor(folder, (0,), mirroring=False).predict_case(files)["segmentation"]
    assert (result == expected).mean() >= 0.999  # nnU-Net's half precision cannot tell the closest apart


@pytest.mark.parametrize("kind", KINDS)
def test_the_ensemble_is_the_one_of_nnunet_with_probabilities_for_logits(kind: str, tmp_path: Path) -> None:
    model, data = KINDS[kind]
    mirror = (1,) if kind == "2d" else (0, 2)
    folder = make_model(tmp_path / "results", **model, folds=(0, 1), mirror=mirror)
    files = first_case(tmp_path, **data)
    expected = nnunet_segmentation(folder, files, (0, 1), mirroring=True, probabilities=True)
    logits = nnunet_segmentation(folder, files, (0, 1), mirroring=True)
    predictor = Predictor(folder, (0, 1))
    assert predictor.members == 2 * 2 ** len(mirror)
    result = predictor.predict_case(files)
    different = result["segmentation"] != expected
    assert different.shape == expected.shape and different.mean() <= 1e-3
    assert margins(result["probabilities"][:, different], kind == "regions").max(initial=0) < 1e-3, "no ties"
    assert (logits == expected).mean() < 0.999, "averages of logits would pass as well"


def test_a_cascade_needs_and_uses_the_previous_stage(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "results", labels=THREE, configuration="3d_cascade_fullres")
    files = first_case(tmp_path)
    predictor = Predictor(folder, (0,))
    with pytest.raises(ValueError, match="3d_lowres"):
        predictor.predict_case(files)
    label = tmp_path / "raw" / "Dataset871_Predict" / "labelsTr" / "case_000.nii.gz"
    result = predictor.predict_case(files, label)
    expected = nnunet_segmentation(folder, files, previous=str(label), probabilities=True)
    assert (result["segmentation"] == expected).mean() >= 0.999
