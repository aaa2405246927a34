"""Every kind of dataset and configuration that nnU-Net plans: two epochs of training, validation, prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from workspace import (
    MAIN,
    Workspace,
    check_segmentations,
    curves,
    log_of,
    make_trainer,
    plan,
    predict,
    preprocess,
    shrink,
    train,
)

from synthetic import make_raw_dataset

TRAINER = "DMEDSegTrainer_2epochs_1iters_1valiters_save1"


def check_model(model: Path, images: Path, output: Path, fold: int | str = 0, **options: str) -> str:
    """Curves are complete and finite, the validation was evaluated, images are segmented. Returns the log."""
    logged = curves(model / f"fold_{fold}" / "checkpoint_final.pth")
    assert {len(v) for v in logged.values()} == {2}
    assert np.isfinite([v for k, v in logged.items() if k.startswith(("train_", "val_"))]).all()
    summary = json.loads((model / f"fold_{fold}" / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    predict(model, images, output, (fold,), **options)
    check_segmentations(model, images, output)
    log = log_of(model / f"fold_{fold}")
    assert "non-finite" not in log
    return log


def test_2d(workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path) -> None:
    train(main_dataset, TRAINER, "2d")
    log = check_model(workspace.model(MAIN, TRAINER, "2d"), test_images, tmp_path / "out")
    assert "2 labelled and 4 unlabelled training cases" in log


def test_lowres_on_all_cases_and_the_cascade_on_top(
    workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path
) -> None:
    """Fold ``all`` segments every labelled case for the next stage, but no image of ``imagesTu``."""
    train(main_dataset, TRAINER, "3d_lowres", "all")
    low = workspace.model(MAIN, TRAINER, "3d_lowres")
    log = check_model(low, test_images, tmp_path / "low", "all")
    assert "5 labelled and 2 unlabelled training cases" in log
    assert len(list((low / "predicted_next_stage" / "3d_cascade_fullres").iterdir())) == 5
    train(main_dataset, TRAINER, "3d_cascade_fullres")
    cascade = workspace.model(MAIN, TRAINER, "3d_cascade_fullres")
    log = check_model(cascade, test_images, tmp_path / "full", folder_with_segs_from_prev_stage=str(tmp_path / "low"))
    assert "2 labelled and 2 unlabelled training cases" in log
    assert log.count("2 unlabelled cases are left out: the previous stage has not") == 1


def test_anisotropic_regions_of_two_channels(workspace: Workspace, tmp_path: Path) -> None:
    """Dummy 2D augmentation, overlapping sigmoid regions, nonzero masks; no fold lists unlabelled cases."""
    dataset = "Dataset802_Regions"
    raw = make_raw_dataset(
        workspace.root / "nnUNet_raw", 802, "Regions", cases=5, unlabeled=1, shape=(8, 20, 22), spacing=(4, 1, 1),
        channels=2, labels={"background": 0, "whole": [1, 2], "core": 2}, zero_background=True,
    )  # fmt: skip
    file = plan(workspace, dataset)
    plans = shrink(file, (4, 16, 16), ((1, 1, 1), (1, 2, 2), (1, 2, 2)))
    assert plans["configurations"]["3d_fullres"]["use_mask_for_norm"] == [True, True]
    preprocess(dataset, ["3d_fullres"], unlabeled=True)
    train(dataset, TRAINER)
    model = workspace.model(dataset, TRAINER)
    log = check_model(model, raw / "imagesTu", tmp_path / "out")
    assert log.count("do_dummy_2d_data_aug: True") == 2  # labelled and unlabelled stream
    assert "4 labelled and 1 unlabelled training cases" in log
    weights = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert weights["fusion.seg_layers.0.weight"].shape[0] == 2
    assert weights["ce.encoder.0.0.convs.0.conv.weight"].shape[1] == 2


def test_ignore_label_with_residual_encoder(workspace: Workspace, tmp_path: Path) -> None:
    """A case that carries the ignore label only is trained on as an unlabelled one, without any imagesTu."""
    dataset, plans = "Dataset803_Ignore", "nnUNetResEncUNetMPlans"
    raw = make_raw_dataset(
        workspace.root / "nnUNet_raw", 803, "Ignore", cases=5, shape=(14, 16, 18), ignore=True, ignored_cases=2
    )
    file = plan(workspace, dataset, "nnUNetPlannerResEncM", plans)
    content = shrink(file, (12, 12, 12))
    network = content["configurations"]["3d_fullres"]["architecture"]["network_class_name"]
    assert network.endswith("ResidualEncoderUNet")
    splits = [{"train": ["case_000", "case_001", "case_003", "case_004"], "val": ["case_002"]}]
    (file.parent / "splits_final.json").write_text(json.dumps(splits))
    preprocess(dataset, ["3d_fullres"], unlabeled=False, plans=plans)
    train(dataset, TRAINER, plans=plans)
    log = check_model(workspace.model(dataset, TRAINER, plans=plans), raw / "imagesTr", tmp_path / "out")
    assert "2 labelled and 2 unlabelled training cases." in log


def test_supervised_without_unlabeled_images(workspace: Workspace, tmp_path: Path) -> None:
    """Regions with an ignore label, images that are 2D only, nnU-Net's own split; said once that this is supervised."""
    dataset = "Dataset804_Flat"
    raw = make_raw_dataset(
        workspace.root / "nnUNet_raw", 804, "Flat", cases=5, shape=(1, 24, 26), spacing=(999, 1, 1), ignore=False,
        labels={"background": 0, "whole": [1, 2], "core": 2},
    )  # fmt: skip
    _ignore_a_corner(raw)
    shrink(plan(workspace, dataset), (16, 16, 16))
    preprocess(dataset, ["2d"], unlabeled=False)
    train(dataset, TRAINER, "2d")
    model = workspace.model(dataset, TRAINER, "2d")
    log = check_model(model, raw / "imagesTr", tmp_path / "out")
    assert log.count("No unlabelled images: the training is supervised.") == 1
    assert not any("cac" in k for k in curves(model / "fold_0" / "checkpoint_final.pth"))


def _ignore_a_corner(raw: Path) -> None:
    dataset_json = json.loads((raw / "dataset.json").read_text())
    dataset_json["labels"]["ignore"] = 3
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    for file in (raw / "labelsTr").iterdir():
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        array[..., :8, :8] = 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))


def test_stock_trainer_reads_the_same_split(workspace: Workspace, main_dataset: str) -> None:
    """The baseline: nnU-Net's own trainer ignores the unlabelled cases of the same file."""
    name = "nnUNetTrainer_2epochs_1iters_1valiters_seed3"
    train(main_dataset, name)
    assert "This split has 2 training and 1 validation cases." in log_of(workspace.model(MAIN, name) / "fold_0")
    assert {len(v) for v in curves(workspace.model(MAIN, name) / "fold_0" / "checkpoint_final.pth").values()} == {2}


def test_share_of_the_labels_on_all_cases(main_dataset: str) -> None:
    """Fold ``all`` has no entry in the split file, so a percentage is taken of every labelled case."""
    trainer = make_trainer(main_dataset, "DMEDSegTrainer_40percent", fold="all")
    train_ids, val_ids = trainer.do_split()
    assert sorted(train_ids) == ["case_000", "case_001"] and len(val_ids) == 5
    assert sorted(trainer._find_pool().cases) == ["case_002", "case_003", "case_004", "extra_000", "extra_001"]
