"""The latent methods by nnU-Net's own commands: codec, LEAF, TextDiffSeg, predictions far from where they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from workspace import (
    FOLDERS,
    MAIN,
    Workspace,
    assert_same_files,
    check_training,
    command,
    log_of,
    make_trainer,
    predict,
    train,
    weights,
)

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.cli.main import main
from nnunet_diffext.stages import FINAL, StageError

pytestmark = pytest.mark.slow

BUDGET = "1epochs_2iters_1valiters"
CODEC = f"MaskAutoencoderTrainer_{BUDGET}_stride2"
LEAF = f"LEAFTrainer_noAlign_{BUDGET}_preflight0"
TEXT = f"TextDiffSegTrainer_randomText_{BUDGET}_2steps_stride2"
VARIABLE = "nnUNet_diffext_codec"
DEVICE = ("-device", "cpu")


@pytest.fixture(scope="module")
def codec(workspace: Workspace, main_dataset: str) -> Path:
    """Model folder of the mask autoencoder, trained by the stock command."""
    command("nnUNetv2_train", "801", "3d_fullres", "0", "-tr", CODEC, *DEVICE, **workspace.environment)
    return workspace.model(main_dataset, CODEC)


@pytest.fixture(scope="module")
def leaf(workspace: Workspace, codec: Path) -> Path:
    """Model folder of LEAF, trained by the stock command on that codec."""
    environment = {**workspace.environment, VARIABLE: str(codec)}
    command("nnUNetv2_train", "801", "3d_fullres", "0", "-tr", LEAF, *DEVICE, **environment)
    return workspace.model(MAIN, LEAF)


@pytest.fixture(scope="module")
def text(workspace: Workspace, main_dataset: str) -> Path:
    """Model folder of TextDiffSeg, trained in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in workspace.environment.items():
            patch.setenv(name, folder)
        train(main_dataset, TEXT)
    return workspace.model(main_dataset, TEXT)


def test_codec_writes_down_how_well_it_reconstructs(codec: Path) -> None:
    assert {"train_sup", "train_size"} < check_training(codec).keys()
    written = json.loads((codec / "fold_0" / "validation" / "reconstruction.json").read_text())
    assert list(written["dice"]) == ["ball"] and 0 <= written["dice"]["ball"] <= 1
    assert int(weights(codec)["scale.updates"]) == 2


def test_codec_cannot_be_predicted_with(codec: Path, test_images: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot segment an image. Train a method that builds on it"):
        predict(codec, test_images, tmp_path / "out")


def test_leaf_is_trained_on_it(leaf: Path, codec: Path) -> None:
    assert {"train_latent", "train_sup"} < check_training(leaf).keys()
    summary = json.loads((leaf / "fold_0" / "validation" / "summary.json").read_text())
    assert np.isfinite(summary["foreground_mean"]["Dice"])
    log = log_of(leaf / "fold_0")
    assert f"Codec: {codec}, fold 0." in log and "Reconstruction Dice of 20 training patches: ball" in log
    assert "Huang, Q." in log
    assert json.loads((leaf / "plans.json").read_text())["diffext"]["LEAFTrainer"]["codec_trainer"] == CODEC
    there, here = weights(codec), weights(leaf)
    assert all(torch.equal(here[f"codec.{k}"], v) for k, v in there.items()), "the codec is frozen"
    saved = read_safely(leaf / "fold_0" / FINAL)
    assert saved["diffext_teacher"].keys() == here.keys()
    assert any(not torch.equal(v, here[k]) for k, v in saved["diffext_teacher"].items()), "the average lags behind"


def test_preflight_stops_a_training_on_a_bad_codec(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(codec))
    with pytest.raises(StageError, match="loses too much of ball .* MaskAutoencoderTrainer_stride1_channels8"):
        train(MAIN, LEAF.replace("_preflight0", ""))


def test_text_is_recorded_and_the_encoder_watched(text: Path) -> None:
    logged = check_training(text)
    assert {"train_sup", "train_diffusion", "train_anchor", "label_variance_share"} < logged.keys()
    block = json.loads((text / "plans.json").read_text())["diffext"]["TextDiffSegTrainer"]
    assert block["prompts"] == {"ball": "MR image of the ball"} and block["text_shape"] == [1, 8, 768]
    log = log_of(text / "fold_0")
    assert 'Prompts: {"ball": "MR image of the ball"}' in log and "Labels reconstructed: ball 0." in log


@pytest.mark.parametrize("method", ["leaf", "text"])
def test_copied_folder_predicts_alone(
    method: str, workspace: Workspace, test_images: Path, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By nnU-Net's predictor and by ours with samples, while all that was there in training is gone."""
    model: Path = request.getfixturevalue(method)
    before = predict(model, test_images, tmp_path / "before")
    copy = tmp_path / MAIN / model.name
    shutil.copytree(model, copy)
    for name in FOLDERS:
        monkeypatch.delenv(name)
    away = workspace.root.with_name(f"away_{method}")
    workspace.root.rename(away)
    options = ("-i", str(test_images), "-f", "0", *DEVICE, "--disable_progress_bar")
    samples = ("predict", "-m", str(copy), "-o", str(tmp_path / "samples"), *options, "-samples", "2", "-steps", "2")
    samples += ("--uncertainty", "--save_samples", "--disable_tta", "-npp", "0", "-nps", "0")
    try:
        if method == "leaf":
            named = ("-d", MAIN, "-c", "3d_fullres", "-tr", LEAF, "-o", tmp_path / "after", "-npp", "1", "-nps", "1")
            command("nnUNetv2_predict", *named, *options, **dict.fromkeys(FOLDERS, str(tmp_path)))
            command("nnunet_diffext", *samples)
        else:  # without new processes, which take most of the time
            predict(copy, test_images, tmp_path / "after")
            assert main(samples) == 0
    finally:
        away.rename(workspace.root)
    assert_same_files(before, tmp_path / "after")
    drawn = sorted(f.name for f in (tmp_path / "samples").rglob("*.nii.gz") if "extra_000" in f.name)
    assert "extra_000.nii.gz" in drawn and len(drawn) >= 3, "segmentation, two samples, maps"


@pytest.mark.parametrize("method", ["leaf", "text"])
def test_stopped_training_continues_without_its_stage(
    method: str, own_workspace: Workspace, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``--c`` after the first of two epochs, when the codec has been deleted; both sets of weights go on."""
    name = (LEAF if method == "leaf" else TEXT).replace("1epochs", "2epochs").replace("_1valiters", "_1valiters_save1")
    if method == "leaf":
        shutil.copytree(request.getfixturevalue("codec"), tmp_path / "codec")
        monkeypatch.setenv(VARIABLE, str(tmp_path / "codec"))
    stopped = make_trainer(MAIN, name)
    plain = stopped.on_epoch_end

    def stop() -> None:
        plain()
        raise KeyboardInterrupt

    stopped.on_epoch_end = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run_training()
    saved = read_safely(own_workspace.model(MAIN, name) / "fold_0" / "checkpoint_latest.pth")
    shutil.rmtree(tmp_path / "codec", ignore_errors=True)

    resumed = make_trainer(MAIN, name, resume=True)
    assert resumed.current_epoch == 1
    for module, part in ((resumed.teacher, "network_weights"), (resumed.network, "diffext_teacher")):
        assert all(torch.equal(v, saved[part][k]) for k, v in module.state_dict().items())
    resumed.run_training()
    check_training(own_workspace.model(MAIN, name), epochs=2)
