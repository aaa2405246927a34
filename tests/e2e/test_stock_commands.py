"""The main path with nnU-Net's own commands, and what a finished training leaves behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace import FOLDERS, MAIN, TRAINER, Workspace, assert_same_files, command, curves, log_of, predict, train

from nnunet_diffext.trainers.dmed import DMEDSettings


def test_training_leaves_what_nnunet_leaves(trained: Path) -> None:
    fold = trained / "fold_0"
    files = ("checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "debug.json", "validation/summary.json")
    for name in files:
        assert (fold / name).stat().st_size > 0, name
    assert not (fold / "checkpoint_latest.pth").exists()
    assert not list(fold.glob(".*")), "temporary files are left"
    debug = json.loads((fold / "debug.json").read_text())
    assert debug["device"] == "cpu" and "epochs=1" in debug["settings"]
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1 and "Dice" in summary["foreground_mean"]
    # --npz
    probabilities = np.load(fold / "validation" / "case_004.npz")["probabilities"]
    assert probabilities.shape == (2, 14, 16, 18)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-3)


def test_log_names_the_data_and_one_curve_per_loss(trained: Path) -> None:
    log = log_of(trained / "fold_0")
    assert log.count("2 labelled and 4 unlabelled training cases") == 1
    assert "No unlabelled images" not in log
    assert "Xun, Z., Ku, Y. (2026)" in log
    logged = curves(trained / "fold_0" / "checkpoint_final.pth")
    parts = {k for k in logged if k.startswith("train_")}
    assert parts == {f"train_{k}" for k in ("losses", "sup", "sup_experts", "cac", "cac_experts", "diffusion")}
    assert {len(v) for v in logged.values()} == {1}
    assert all(np.isfinite(logged[k]).all() for k in parts)


def test_model_folder_records_the_settings(trained: Path) -> None:
    block = json.loads((trained / "plans.json").read_text())["diffext"]
    settings = block["DMEDSegTrainer"]
    assert settings.keys() == {f.name for f in fields(DMEDSettings)}
    assert (settings["epochs"], settings["iterations"], settings["seed"]) == (1, 2, 1)
    assert block["label_space"] == {"num_heads": 2, "regions": False, "ignore_label": None}


def test_network_weights_hold_the_network_only(trained: Path) -> None:
    checkpoint = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["diffext_teacher"].keys() == checkpoint["network_weights"].keys()
    assert not any("teacher" in k for k in checkpoint["network_weights"])
    differs = [
        k for k, v in checkpoint["network_weights"].items() if not torch.equal(v, checkpoint["diffext_teacher"][k])
    ]
    assert differs, "the teacher should lag behind the student"


def test_commands_predict_export_install_predict(
    workspace: Workspace, trained: Path, test_images: Path, tmp_path: Path
) -> None:
    here, there, archive, results = (tmp_path / n for n in ("here", "there", "model.zip", "results"))
    common = ("-c", "3d_fullres", "-tr", TRAINER, "-f", "0")
    predict_options = ("-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar")
    command("nnUNetv2_predict", "-d", "801", "-i", test_images, "-o", here, *common, *predict_options)
    command("nnUNetv2_export_model_to_zip", "-d", "801", "-o", archive, *common)
    results.mkdir()
    elsewhere = {**workspace.environment, "nnUNet_raw": str(tmp_path), "nnUNet_preprocessed": str(tmp_path)}
    elsewhere["nnUNet_results"] = str(results)
    command("nnUNetv2_install_pretrained_model_from_zip", archive, **elsewhere)
    command("nnUNetv2_predict", "-d", MAIN, "-i", test_images, "-o", there, *common, *predict_options, **elsewhere)
    assert_same_files(here, there)


def test_copied_model_folder_predicts_alone(
    workspace: Workspace, trained: Path, test_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = predict(trained, test_images, tmp_path / "before")
    copy = tmp_path / "model"
    shutil.copytree(trained, copy)
    for name in FOLDERS:
        monkeypatch.delenv(name)
    away = workspace.root.with_name("away")
    workspace.root.rename(away)
    try:
        after = predict(copy, test_images, tmp_path / "after")
    finally:
        away.rename(workspace.root)
    assert_same_files(before, after)


def test_several_folds_predict_together(trained: Path, test_images: Path, tmp_path: Path) -> None:
    both = predict(trained, test_images, tmp_path / "both", None, save_probabilities=True)
    single = [predict(trained, test_images, tmp_path / f"{f}", (f,), save_probabilities=True) for f in (0, 1)]
    for case in ("extra_000", "extra_001"):
        mean, first, second = (
            np.log(np.load(folder / f"{case}.npz")["probabilities"].astype(np.float64)) for folder in (both, *single)
        )
        # nnU-Net averages logits: differences between classes average, up to half precision
        np.testing.assert_allclose(mean[1] - mean[0], (first + second)[1] / 2 - (first + second)[0] / 2, atol=2e-2)


@pytest.mark.parametrize("option", ["only_run_validation", "continue_training"])
def test_finished_training_can_be_validated_again(trained: Path, option: str) -> None:
    """``--val``, and ``--c`` on a finished training, which has no epoch left."""
    fold = trained / "fold_1"
    summary = fold / "validation" / "summary.json"
    before = json.loads(summary.read_text())["foreground_mean"]
    logged = curves(fold / "checkpoint_final.pth")
    summary.unlink()
    train(MAIN, TRAINER, fold=1, **{option: True})
    assert json.loads(summary.read_text())["foreground_mean"] == before
    assert curves(fold / "checkpoint_final.pth") == logged


def test_pretrained_weights_start_a_training(workspace: Workspace, trained: Path) -> None:
    source = trained / "fold_0" / "checkpoint_final.pth"
    # a learning rate of zero keeps what was loaded
    name = "DMEDSegTrainer_1epochs_1iters_1valiters_lr0_wd0"
    train(MAIN, name, pretrained_weights=str(source))
    result = workspace.model(MAIN, name) / "fold_0" / "checkpoint_final.pth"
    loaded, given = (torch.load(f, weights_only=False)["network_weights"] for f in (result, source))
    heads = {k for k in given if ".seg_layers." in k}
    assert heads and all(torch.equal(loaded[k], given[k]) for k in given.keys() - heads)
    assert not all(torch.equal(loaded[k], given[k]) for k in heads)
