"""M4oE by nnU-Net's own commands: datasets merged, two phases, predictions of known and unknown modality, one more."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets
from workspace import (
    FOLDERS,
    PLANS,
    Workspace,
    assert_same_files,
    check_training,
    command,
    log_of,
    make_trainer,
    plan,
    predict,
    preprocess,
    shrink,
    threads_instead_of_spawn,
    train,
    weights,
)

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.cli.main import main
from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.data.splits import load_split
from nnunet_diffext.inference.modality import set_modality
from nnunet_diffext.inference.predictor import Predictor
from synthetic import make_raw_dataset

pytestmark = pytest.mark.slow

TWO, THREE = "Dataset823_Two", "Dataset824_Three"
SIZE = "dim8_window3_depth1"
BUDGET = "1epochs_2iters_1valiters"
PRETRAIN = f"M4oEPretrainTrainer_{SIZE}_{BUDGET}"
M4OE = f"M4oETrainer_{SIZE}_{BUDGET}"
VARIABLE = "nnUNet_diffext_pretraining"
DEVICE = ("-device", "cpu")
QUIET = ("-npp", "0", "-nps", "0", "--disable_progress_bar", "--disable_tta")
SOURCES = {
    "CT": (820, {"background": 0, "liver": 1, "spleen": 2}),
    "MR": (821, {"background": 0, "spleen": 1, "tumour": 2}),
    "US": (822, {"background": 0, "liver": 1, "cyst": 2}),
}


def merge(workspace: Workspace, modalities: tuple[str, ...], name: str) -> None:
    """``nnunet_diffext merge`` of the sources of these modalities, planned by nnU-Net."""
    numbers = [str(SOURCES[m][0]) for m in modalities]
    arguments = ["merge", "-d", *numbers, "-o", name[7:10], "--name", name[11:], "--modality", *modalities]
    assert main([*arguments, "-np", "1"]) == 0
    shrink(plan(workspace, name), (8, 12, 12))


@pytest.fixture(scope="module")
def sources(workspace: Workspace) -> None:
    """Three modalities that look different, whose labels overlap; CT has images without labels, too."""
    for seed, (modality, (number, labels)) in enumerate(SOURCES.items()):
        make_raw_dataset(
            workspace.root / "nnUNet_raw", number, modality, cases=3 if modality != "US" else 2, shape=(10, 14, 16),
            unlabeled=2 if modality == "CT" else 0, labels=labels, modality=modality, seed=seed,
            zero_background=modality == "MR",
        )  # fmt: skip


@pytest.fixture(scope="module")
def activated(workspace: Workspace) -> Iterator[None]:
    """What every test runs in, for fixtures that live longer."""
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in workspace.environment.items():
            patch.setenv(name, folder)
        patch.setattr(multiprocessing, "get_context", threads_instead_of_spawn)
        yield


@pytest.fixture(scope="module")
def two(workspace: Workspace, sources: None, activated: None) -> str:
    """CT and MR."""
    merge(workspace, ("CT", "MR"), TWO)
    preprocess(TWO, ["3d_fullres"], unlabeled=True)
    return TWO


@pytest.fixture(scope="module")
def pretrained(workspace: Workspace, two: str) -> Path:
    """Phase 1, by the stock command."""
    command("nnUNetv2_train", "823", "3d_fullres", "0", "-tr", PRETRAIN, *DEVICE, **workspace.environment)
    return workspace.model(TWO, PRETRAIN)


@pytest.fixture(scope="module")
def trained(workspace: Workspace, pretrained: Path) -> Path:
    """Phase 2, by the stock command."""
    environment = {**workspace.environment, VARIABLE: str(pretrained)}
    command("nnUNetv2_train", "823", "3d_fullres", "0", "-tr", M4OE, *DEVICE, **environment)
    return workspace.model(TWO, M4OE)


@pytest.fixture(scope="module")
def images(workspace: Workspace, two: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of each modality."""
    folder = tmp_path_factory.mktemp("images")
    for case in ("820_extra_000", "821_case_000"):
        sub = "imagesTu" if "extra" in case else "imagesTr"
        shutil.copy(workspace.raw(TWO) / sub / f"{case}_0000.nii.gz", folder)
    return folder


# ------------------------------------------------------------------ two phases
def test_phase_1(pretrained: Path) -> None:
    assert "train_reconstruction" in check_training(pretrained)
    written = json.loads((pretrained / "fold_0" / "validation" / "reconstruction.json").read_text())
    assert written["explained_variance"] < 1
    assert "4 labelled and 2 unlabelled training cases" in log_of(pretrained / "fold_0")


def test_phase_2(trained: Path, pretrained: Path) -> None:
    assert {"train_sup", "train_modality", "modality_told"} < check_training(trained).keys()
    fold = trained / "fold_0"
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2 and set(summary["mean"]) == {"1", "2", "3"}
    log = log_of(fold)
    assert f"Pretraining: {pretrained}, fold 0." in log and "tensors of the encoder, 8 of them of experts" in log
    assert "Modalities: CT, MR (2 experts)" in log and "Jiang, Y." in log
    assert (fold / "expert_usage.png").is_file()
    assert json.loads((fold / "expert_usage.json").read_text())["experts"] == 2
    block = json.loads((trained / "plans.json").read_text())["diffext"]["M4oETrainer"]
    assert block["modalities"] == {"CT": [True, True, True, False], "MR": [True, False, True, True]}
    assert block["pretraining_trainer"] == PRETRAIN


def test_stopped_training_continues_without_phase_1(
    trained: Path, pretrained: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = M4OE.replace("1epochs", "2epochs") + "_save1"
    monkeypatch.setenv(VARIABLE, str(pretrained))
    stopped = make_trainer(TWO, name)

    def stop() -> None:
        type(stopped).on_epoch_end(stopped)
        raise KeyboardInterrupt

    stopped.on_epoch_end = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run_training()
    fold = workspace.model(TWO, name) / "fold_0"
    saved = read_safely(fold / "checkpoint_latest.pth")["network_weights"]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    resumed = make_trainer(TWO, name, resume=True)
    assert resumed.current_epoch == 1 and equal(resumed.network.state_dict(), saved)
    resumed.run_training()
    check_training(fold.parent, epochs=2)
    finished = weights(fold.parent)
    assert not equal(finished, saved)
    train(TWO, name, continue_training=True)  # nothing is left to do but the validation
    check_training(fold.parent, epochs=2)
    assert equal(weights(fold.parent), finished)


# ------------------------------------------------------------------ predictions
def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, other[k]) for k, v in one.items())


def test_copied_folder_predicts_alone(
    trained: Path, images: Path, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stock command, while all that was there in training is gone."""
    before = predict(trained, images, tmp_path / "before")
    shutil.copytree(trained, tmp_path / TWO / trained.name)
    for name in FOLDERS:
        monkeypatch.delenv(name)
    away = workspace.root.with_name("away_m4oe")
    workspace.root.rename(away)
    named = ("-d", TWO, "-c", "3d_fullres", "-tr", M4OE, "-f", "0", *DEVICE, "-npp", "1", "-nps", "1")
    paths = ("-i", images, "-o", tmp_path / "after")
    try:
        command("nnUNetv2_predict", *paths, *named, **dict.fromkeys(FOLDERS, str(tmp_path)))
    finally:
        away.rename(workspace.root)
    assert_same_files(before, tmp_path / "after")


def predicted(model: Path, images: Path, output: Path, *options: str) -> dict[str, np.ndarray]:
    """Probabilities of ``nnunet_diffext predict``."""
    arguments = ["predict", "-m", str(model), "-i", str(images), "-o", str(output), "-f", "0", *DEVICE, *QUIET]
    assert main([*arguments, "--save_probabilities", *options]) == 0
    return {f.stem: np.load(f)["probabilities"] for f in sorted(output.glob("*.npz"))}


def test_modality_that_is_known(trained: Path, images: Path, tmp_path: Path) -> None:
    """No labels but its own; without it those of the modality that the network tells."""
    tile = tmp_path / "tiles"
    tile.mkdir()
    for file in images.iterdir():
        sitk.WriteImage(sitk.ReadImage(str(file))[2:14, 1:13, 1:9], str(tile / file.name))
    unknown, known = predicted(trained, tile, tmp_path / "unknown"), {}
    for modality, absent in (("CT", 3), ("MR", 1)):
        out = tmp_path / modality
        known[modality] = predicted(trained, tile, out, "--modality", modality)
        assert all(p[absent].max() < 1e-6 and p[2].max() > 1e-3 for p in known[modality].values())
        named = modalities_of(json.loads((out / "dataset.json").read_text()))
        assert all(named.modality(case) == modality for case in known[modality]), "for whoever evaluates them"
    assert len(unknown) == 2
    for case, p in unknown.items():
        assert [m for m in known if np.allclose(p, known[m][case], atol=1e-5)], "a guess, and nothing in between"


def test_modality_that_nobody_knows(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "-m", str(trained), "-i", str(images), "-o", str(tmp_path / "out"), "-f", "0", *DEVICE]
    assert main([*arguments, "--modality", "PET"]) == 1
    assert capsys.readouterr().err == "nnunet_diffext predict: error: --modality PET: this model knows CT, MR.\n"
    assert not (tmp_path / "out").exists()


def test_models_without_modalities(pretrained: Path) -> None:
    with pytest.raises(ValueError, match="this model knows of no modalities; M4oETrainer trains one that does"):
        set_modality(Predictor(pretrained, (0,)).nnunet, "CT")


# ------------------------------------------------------------------ one modality more
@pytest.fixture(scope="module")
def larger(workspace: Workspace, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with an expert for US, on a dataset that was preprocessed with the model's plans."""
    merge(workspace, ("CT", "MR", "US"), THREE)
    move_plans_between_datasets(TWO, THREE, PLANS)
    preprocess(THREE, ["3d_fullres"], unlabeled=False)
    folder = tmp_path_factory.mktemp("grown") / "larger"
    assert main(["add_modality", "-m", str(trained), "-d", "824", "-o", str(folder)]) == 0
    before, after = (load_split(workspace.preprocessed(dataset), 0) for dataset in (TWO, THREE))
    assert set(before.train) < set(after.train) and set(before.val) < set(after.val)
    return folder


@torch.no_grad()
def check_same(model: Path, larger: Path, modality: str | None) -> None:
    """Every bit that the network gives, in the labels that the smaller one knows."""
    networks = []
    for folder in (model, larger):
        predictor = Predictor(folder, (0,))
        if modality is not None:
            set_modality(predictor.nnunet, modality)
        networks.append(predictor.nnunet.network.eval())
    image = torch.randn(2, 1, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    before, after = (network(image) for network in networks)
    assert torch.equal(after[:, :4], before) and after[:, 4].max() < -16


def test_larger_model_predicts_the_same(trained: Path, larger: Path, images: Path, tmp_path: Path) -> None:
    """For modalities that the model knew; also while the modality is not given, since the new expert is not used before
    it has been trained. Probabilities of one label more are rounded in another way.
    """
    for modality in ("CT", "MR", None):
        check_same(trained, larger, modality)
        options = () if modality is None else ("--modality", modality)
        folders = tmp_path / f"before{modality}", tmp_path / f"after{modality}"
        before, after = (predicted(m, images, f, *options) for m, f in zip((trained, larger), folders, strict=True))
        for case, p in before.items():
            np.testing.assert_allclose(after[case][:4], p, atol=1e-6)
        assert_same_files(*folders)


def test_larger_model_is_not_asked_before_it_is_trained(
    larger: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", "-m", str(larger), "-i", str(images), "-o", str(tmp_path / "out"), "-f", "0", *DEVICE]
    assert main([*arguments, "--modality", "US"]) == 1
    assert "the model has an expert and a head for US, but was never trained on it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_larger_model_is_trained(
    trained: Path, larger: Path, workspace: Workspace, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is new: for the old modalities, it still predicts the same."""
    monkeypatch.setenv(VARIABLE, str(larger))
    train(THREE, f"{M4OE}_freezeOld")
    model = workspace.model(THREE, f"{M4OE}_freezeOld")
    check_training(model)
    assert "The whole network starts from it." in log_of(model / "fold_0")
    saved = weights(model)
    assert saved["active"].all() and saved["since"].tolist() == [0, 0, 1]
    for modality in ("CT", "MR"):
        check_same(trained, model, modality)
    new = predicted(model, images, tmp_path / "US", "--modality", "US")
    assert all(p[4].max() > 1e-3 and p[3].max() < 1e-6 for p in new.values())
