"""PGRD on a trained nnU-Net: stock commands, the model without its prior, all kinds of data, resuming, two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from ranks import check_ranks_agree, train_on_two_ranks
from workspace import (
    FOLDERS,
    MAIN,
    Workspace,
    assert_same_files,
    check_training,
    command,
    curves,
    log_of,
    make_trainer,
    plan,
    predict,
    preprocess,
    segmentations,
    shrink,
    train,
    weights,
)

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.stages import FINAL, StageError
from synthetic import make_raw_dataset

BUDGET = "2epochs_1iters_1valiters_save1"
PRIOR, PGRD = "nnUNetTrainer_1epochs_1iters_1valiters", f"PGRDTrainer_{BUDGET}"
VARIABLE = "nnUNet_diffext_prior"
Plain = dict[str, torch.Tensor]


def prior_in(model: Path, fold: int | str = 0) -> Plain:
    """Weights of the prior inside of a PGRD model."""
    return {k.removeprefix("prior."): v for k, v in weights(model, fold).items() if k.startswith("prior.")}


def same(a: Plain, b: Plain) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def check_evaluated(model: Path, epochs: int = 2) -> dict[str, list[Any]]:
    """A finished training and its validation."""
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    return check_training(model, epochs)


@pytest.fixture(scope="module")
def prior(workspace: Workspace, main_dataset: str) -> Path:
    """Model folder of a stock training of fold 0, which every test of this module builds on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in workspace.environment.items():
            patch.setenv(name, folder)
        train(main_dataset, PRIOR)
    return workspace.model(main_dataset, PRIOR)


@pytest.fixture(scope="module")
def pgrd(workspace: Workspace, prior: Path) -> Path:
    """Model folder of PGRD, trained by the stock command."""
    options = ("-tr", PGRD, "-device", "cpu")
    command("nnUNetv2_train", "801", "3d_fullres", "0", *options, **workspace.environment, **{VARIABLE: str(prior)})
    return workspace.model(MAIN, PGRD)


def test_training_says_and_records_what_it_builds_on(pgrd: Path, prior: Path) -> None:
    logged = check_evaluated(pgrd)
    assert {"train_velocity", "train_dds"} < logged.keys()
    log = log_of(pgrd / "fold_0")
    assert f"Prior: {prior}, fold 0." in log
    assert log.count("Prior (corrupted, corrupted by ") == 1 and "Mao, F." in log
    assert json.loads((pgrd / "plans.json").read_text())["diffext"]["PGRDTrainer"]["prior_trainer"] == PRIOR
    assert same(prior_in(pgrd), weights(prior)), "the prior is frozen"
    saved = read_safely(pgrd / "fold_0" / FINAL)
    assert saved["diffext_prior_strength"] >= 0
    assert 0.02 <= float(saved["network_weights"]["kappa"]) <= 1
    trained = sum(v.ndim > 0 for s in saved["optimizer_state"]["state"].values() for v in s.values())
    assert trained == 2 * len(saved["optimizer_state"]["param_groups"][0]["params"])


def test_copied_folder_predicts_without_the_prior(
    workspace: Workspace, pgrd: Path, test_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = predict(pgrd, test_images, tmp_path / "before")
    copy = tmp_path / "model"
    shutil.copytree(pgrd, copy)
    for name in FOLDERS:
        monkeypatch.delenv(name)
    away = workspace.root.with_name("away_pgrd")
    workspace.root.rename(away)
    try:
        after = predict(copy, test_images, tmp_path / "after")
    finally:
        away.rename(workspace.root)
    assert_same_files(before, after)


def test_exported_and_installed_model(
    pgrd: Path, test_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = predict(pgrd, test_images, tmp_path / "here")
    archive = tmp_path / "model.zip"
    export_pretrained_model(MAIN, str(archive), ("3d_fullres",), PGRD, folds=(0,))
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    install_model_from_zip_file(str(archive))
    command(
        "nnUNetv2_predict", "-d", MAIN, "-i", test_images, "-o", tmp_path / "there", "-c", "3d_fullres", "-tr", PGRD,
        "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar",
    )  # fmt: skip
    assert_same_files(here, tmp_path / "there")


def test_validation_again_without_the_prior(
    pgrd: Path, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--val`` of a finished training, and a new training that is refused before it touches the finished one."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    summary = pgrd / "fold_0" / "validation" / "summary.json"
    before = json.loads(summary.read_text())["foreground_mean"]
    summary.unlink()
    train(MAIN, PGRD, only_run_validation=True)
    assert json.loads(summary.read_text())["foreground_mean"] == before
    file = pgrd / "fold_0" / FINAL
    content = file.read_bytes()
    with pytest.raises(StageError, match="is no model folder"):
        train(MAIN, PGRD)
    assert file.read_bytes() == content


@pytest.mark.parametrize("tokens", ["noPGR", "noDDS_2steps_2samples"])
def test_variants_in_2d(
    tokens: str, workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = f"PGRDTrainer_{tokens}_{BUDGET}"
    if tokens != "noPGR":
        train(main_dataset, PRIOR, "2d")
        monkeypatch.setenv(VARIABLE, str(workspace.model(MAIN, PRIOR, "2d")))
    else:
        monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    train(main_dataset, name, "2d")
    model = workspace.model(MAIN, name, "2d")
    assert ("train_dds" in check_evaluated(model)) == (tokens == "noPGR")
    assert bool(prior_in(model)) == (tokens != "noPGR")
    assert len(segmentations(predict(model, test_images, tmp_path / "out"))) == 2


def test_regions_with_ignore_label(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping sigmoid regions of two channels; the prior is found by the name in the plans' settings."""
    dataset = "Dataset806_PGRDRegions"
    raw = make_raw_dataset(
        workspace.root / "nnUNet_raw", 806, "PGRDRegions", cases=5, shape=(8, 20, 22), spacing=(4, 1, 1), channels=2,
        labels={"background": 0, "whole": [1, 2], "core": 2}, ignore=True,
    )  # fmt: skip
    monkeypatch.delenv(VARIABLE, raising=False)
    file = plan(workspace, dataset)
    plans = shrink(file, (4, 16, 16), ((1, 1, 1), (1, 2, 2), (1, 2, 2)))
    plans["diffext"] = {"PGRDTrainer": {"prior_trainer": PRIOR}}
    file.write_text(json.dumps(plans))
    preprocess(dataset, ["3d_fullres"], unlabeled=False)
    with pytest.raises(StageError, match=f"nnUNetv2_train {dataset} 3d_fullres 0 -tr {PRIOR} -p nnUNetPlans"):
        train(dataset, PGRD)
    train(dataset, PRIOR)
    train(dataset, PGRD)
    model = workspace.model(dataset, PGRD)
    check_evaluated(model)
    assert same(prior_in(model), weights(workspace.model(dataset, PRIOR)))
    assert weights(model)["heads.seg_layers.0.weight"].shape[0] == 2 + 1, "a correction per region, a temperature"
    out = segmentations(predict(model, raw / "imagesTr", tmp_path / "out"))
    assert len(out) == 5 and {int(v) for s in out.values() for v in np.unique(s)} <= {0, 1, 2}


def test_cascade(
    workspace: Workspace, main_dataset: str, test_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prior and PGRD see the segmentation of the previous stage as further channels."""
    train(main_dataset, PRIOR, "3d_lowres", "all")
    low = workspace.model(MAIN, PRIOR, "3d_lowres")
    # nnU-Net looks for the previous stage under the name of the trainer itself
    shutil.copytree(low, workspace.model(MAIN, PGRD, "3d_lowres"))
    train(main_dataset, PRIOR, "3d_cascade_fullres")
    monkeypatch.setenv(VARIABLE, str(workspace.model(MAIN, PRIOR, "3d_cascade_fullres")))
    train(main_dataset, PGRD, "3d_cascade_fullres")
    model = workspace.model(MAIN, PGRD, "3d_cascade_fullres")
    check_evaluated(model)
    assert prior_in(model)["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2
    previous = predict(low, test_images, tmp_path / "low", ("all",))
    out = predict(model, test_images, tmp_path / "out", folder_with_segs_from_prev_stage=str(previous))
    assert len(segmentations(out)) == 2


# ------------------------------------------------------------------ priors of other folds
def test_out_of_fold_priors_and_pretrained_weights(own_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [
        {"train": ["case_000", "case_001", "case_002"], "val": ["case_003"]},
        {"train": ["case_003", "case_004"], "val": ["case_000", "case_001", "case_002"]},
    ]
    (own_workspace.preprocessed(MAIN) / "splits_final.json").write_text(json.dumps(splits))
    for fold in (0, 1):
        train(MAIN, PRIOR, fold=fold)
    priors = own_workspace.model(MAIN, PRIOR)
    assert not same(weights(priors, 0), weights(priors, 1))
    monkeypatch.setenv(VARIABLE, str(priors))

    name = f"PGRDTrainer_oof_{BUDGET}"
    train(MAIN, name)
    model = own_workspace.model(MAIN, name)
    log = log_of(model / "fold_0")
    assert "Training around out-of-fold priors (folds [1])." in log and "Prior (oof, corrupted by 0.000)" in log
    assert same(prior_in(model), weights(priors, 0)), "predictions use the prior of the own fold"

    # the weights of another fold bring another prior along, of which nnU-Net would leave out the heads
    train(MAIN, PGRD, fold=1, pretrained_weights=str(model / "fold_0" / FINAL))
    assert same(prior_in(own_workspace.model(MAIN, PGRD), 1), weights(priors, 1))

    shutil.rmtree(priors / "fold_1")
    with pytest.raises(StageError, match="'oof': 3 training cases, among them case_000, are .* every prior"):
        train(MAIN, name)


# ------------------------------------------------------------------ killed and continued
def test_killed_training_continues_without_the_prior(
    own_workspace: Workspace, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "prior"
    shutil.copytree(prior, copied)
    monkeypatch.setenv(VARIABLE, str(copied))
    name = "PGRDTrainer_900epochs_1iters_1valiters_save1"
    harness = Path(__file__).with_name("killed_while_writing.py")
    done = subprocess.run(
        [sys.executable, str(harness), MAIN, name], env={**os.environ, "nnUNet_n_proc_DA": "0"}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    fold = own_workspace.model(MAIN, name) / "fold_0"
    saved = read_safely(fold / "checkpoint_latest.pth")
    shutil.rmtree(copied)

    trainer = make_trainer(MAIN, name, resume=True)
    epochs = trainer.current_epoch
    assert epochs == saved["current_epoch"] >= 1
    trainer.num_epochs = epochs + 1
    trainer.run_training()
    assert {len(v) for v in curves(fold / FINAL).values()} == {epochs + 1}
    log = log_of(fold)
    assert log.count("Prior (corrupted, corrupted by") == 1, "measured once, before the first epoch"
    assert trainer.bank.kind == "corrupted" and trainer.bank.strength == saved["diffext_prior_strength"]
    now = read_safely(fold / FINAL)["network_weights"]
    for key in ("kappa", "spread"):
        assert torch.equal(now[key], saved["network_weights"][key])
    assert same(prior_in(own_workspace.model(MAIN, name)), weights(prior))


# ------------------------------------------------------------------ two ranks
def test_two_ranks_train_together(workspace: Workspace, prior: Path, tmp_path: Path) -> None:
    full = "PGRDTrainer_2epochs_2iters_1valiters_seed5"
    tokens = ("noPGR", "noDDS", "vanillaDDPM", "x0_TOnly_hardPrior")
    names = [full, *(f"PGRDTrainer_{variant}_2iters_seed3" for variant in tokens)]
    environment = {**workspace.environment, VARIABLE: str(prior)}
    one, other = train_on_two_ranks(tmp_path, MAIN, names, environment)
    for name in names:
        check_ranks_agree(one[name], other[name])
    check_evaluated(workspace.model(MAIN, full))
    assert same(prior_in(workspace.model(MAIN, full)), weights(prior))
