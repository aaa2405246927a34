"""The latent methods and M4oE on what nnU-Net plans for other datasets, and away from home."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from workspace import Workspace, check_segmentations, command, log_of, plan, predict, preprocess, shrink, train

from synthetic import make_raw_dataset

pytestmark = pytest.mark.slow

BUDGET = "1epochs_1iters_1valiters"
CODEC = f"MaskAutoencoderTrainer_stride2_{BUDGET}"
PRETRAINING = f"M4oEPretrainTrainer_dim8_window3_{BUDGET}"
METHODS = {
    f"LEAFTrainer_noAlign_preflight0_{BUDGET}": CODEC,
    f"TextDiffSegTrainer_randomText_stride2_2steps_{BUDGET}": None,
    f"M4oETrainer_dim8_window3_{BUDGET}": PRETRAINING,
}
VARIABLES = ("nnUNet_diffext_codec", "nnUNet_diffext_pretraining")


REGIONS, IGNORE = "Dataset811_Regions", "Dataset812_Ignore"
PLANS = {REGIONS: "nnUNetPlans", IGNORE: "nnUNetResEncUNetMPlans"}


def regions(workspace: Workspace) -> Path:
    """Two channels, overlapping regions, thick slices; made once. Returns images to predict."""
    raw = workspace.raw(REGIONS)
    if not raw.is_dir():
        make_raw_dataset(
            raw.parent, 811, "Regions", cases=5, unlabeled=1, shape=(8, 20, 22), spacing=(4, 1, 1), channels=2,
            labels={"background": 0, "whole": [1, 2], "core": 2},
        )  # fmt: skip
        shrink(plan(workspace, REGIONS), (4, 16, 16), ((1, 1, 1), (1, 2, 2), (1, 2, 2)))
        preprocess(REGIONS, ["2d", "3d_fullres"], unlabeled=True)
    return raw / "imagesTu"


def ignoring(workspace: Workspace) -> Path:
    """An ignore label, and a residual encoder; made once. Returns images to predict."""
    raw = workspace.raw(IGNORE)
    if not raw.is_dir():
        make_raw_dataset(raw.parent, 812, "Ignore", cases=5, shape=(14, 16, 18), ignore=True)
        shrink(plan(workspace, IGNORE, "nnUNetPlannerResEncM", PLANS[IGNORE]), (12, 12, 12))
        preprocess(IGNORE, ["3d_fullres"], unlabeled=False, plans=PLANS[IGNORE])
    return raw / "imagesTr"


def trained(workspace: Workspace, dataset: str, method: str, configuration: str) -> Path:
    """Model folder; stage and method are trained once."""
    stage, where = METHODS[method], (configuration, PLANS[dataset])
    model = workspace.model(dataset, method, *where)
    if model.is_dir():
        return model
    with pytest.MonkeyPatch.context() as patch:
        if stage is not None:
            train(dataset, stage, configuration, plans=PLANS[dataset])
            for variable in VARIABLES:
                patch.setenv(variable, str(workspace.model(dataset, stage, *where)))
        train(dataset, method, configuration, plans=PLANS[dataset])
    return model


def check(model: Path, images: Path, output: Path) -> None:
    """The validation was evaluated, and images are segmented."""
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"]) and "non-finite" not in log_of(model / "fold_0")
    check_segmentations(model, images, predict(model, images, output))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("method", METHODS)
def test_regions_of_two_channels(workspace: Workspace, method: str, configuration: str, tmp_path: Path) -> None:
    images = regions(workspace)
    check(trained(workspace, REGIONS, method, configuration), images, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_ignore_label_with_residual_encoder(workspace: Workspace, method: str, tmp_path: Path) -> None:
    images = ignoring(workspace)
    check(trained(workspace, IGNORE, method, "3d_fullres"), images, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_exported_and_installed_elsewhere(workspace: Workspace, method: str, tmp_path: Path) -> None:
    """By nnU-Net's own commands, into results that know nothing of codec, pre-training or preprocessed data."""
    images = regions(workspace)
    wanted = predict(trained(workspace, REGIONS, method, "3d_fullres"), images, tmp_path / "wanted")
    archive, elsewhere = tmp_path / "model.zip", {name: str(tmp_path / name) for name in workspace.environment}
    for folder in elsewhere.values():
        Path(folder).mkdir()
    common = ("-c", "3d_fullres", "-f", "0", "-tr", method)
    command("nnUNetv2_export_model_to_zip", "-d", REGIONS, "-o", archive, *common)
    command("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    options = ("-npp", "1", "-nps", "1", "-device", "cpu", "--disable_progress_bar")
    command("nnUNetv2_predict", "-d", REGIONS, "-i", images, "-o", tmp_path / "out", *common, *options, **elsewhere)
    (file,) = wanted.glob("*.nii.gz")
    same = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in (wanted, tmp_path / "out"))
    np.testing.assert_array_equal(*same)
