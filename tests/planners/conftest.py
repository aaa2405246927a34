"""Datasets that exist as fingerprint and plans only: planning needs no images but two tiny ones."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from planned_dataset import NAME, NUMBER, SHAPE, SPACING, TRAINING_CASES, Planned  # noqa: E402

from synthetic import make_raw_dataset  # noqa: E402


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with nnUNet_raw and nnUNet_preprocessed. Not to be changed."""
    root = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        raw = make_raw_dataset(root / "nnUNet_raw", NUMBER, "Plan", cases=2, shape=(8, 8, 8))
        dataset_json = json.loads((raw / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": TRAINING_CASES}))
        folder = root / "nnUNet_preprocessed" / NAME
        folder.mkdir()
        intensities = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
        fingerprint = {
            "spacings": [SPACING] * TRAINING_CASES,
            "shapes_after_crop": [SHAPE] * TRAINING_CASES,
            "foreground_intensity_properties_per_channel": {"0": intensities},
            "median_relative_size_after_cropping": 1.0,
        }
        (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        plan_experiment_dataset(NUMBER)
        plan_experiment_dataset(NUMBER, nnUNetPlannerResEncM)
    return root


@pytest.fixture
def planned(prepared: Path, nnunet_folders: dict[str, Path]) -> Planned:
    """Images of 24 x 32 x 32 voxels, labels 0 and 1; nnUNetPlans and nnUNetResEncUNetMPlans."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(prepared / variable / NAME, nnunet_folders[variable] / NAME)
    return Planned(nnunet_folders["nnUNet_raw"] / NAME, nnunet_folders["nnUNet_preprocessed"] / NAME)
