"""``nnunet_diffext add_modality``: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_dataset_json, make_plans
from tiny_growth import MORE, NEW_CASES, NEW_LABELS, THREE, grown, prepare, trained, write
from tiny_m4oe import LABELS, TWO, ready
from tiny_prior import finish

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.modalities import ModalityError
from nnunet_diffext.stages import StageError
from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.m4oe_growth import add_modality


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and the dataset with the new modality."""
    prepare(nnunet_folders, monkeypatch)


# ------------------------------------------------------------------ the command
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints can be pasted; the model that it extends is as it was."""
    folder, _ = trained()
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.suffix in (".json", ".pth")}
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copied"
    folder.rename(copy)
    assert main(["add_modality", "-m", str(copy), "-d", "998", "-o", "larger model"]) == 0
    printed = capsys.readouterr().out
    export, train = [shlex.split(line) for line in printed.splitlines()[-2:]]
    assert export == ["export", f"nnUNet_diffext_pretraining={tmp_path / 'larger model'}"]
    name = "M4oETrainer_dim8_window3_droppath0_freezeOld"
    assert train == ["nnUNetv2_train", "998", "2d", "0", "-tr", name, "-p", "nnUNetPlans"]
    assert "modality US added, labels c; 0.04 M parameters became 0.05 M." in printed
    assert {
        folder / f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.suffix in (".json", ".pth")
    } == before
    assert main(["add_modality", "-m", str(copy), "-d", "998", "-o", "larger model"]) == 1
    assert "exists" in capsys.readouterr().err


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("labels", "diffext", "message"),
    [
        (LABELS, TWO, "The model knows the modalities CT, MR; the dataset has CT, MR. One more is needed"),
        (NEW_LABELS, {**THREE, "modalities": dict(reversed(NEW_CASES.items()))}, "the dataset has US, MR, CT"),
        ({**NEW_LABELS, "a": 2, "b": 1}, THREE, "The model's labels are a, b; the dataset's are b, a, c"),
        (
            NEW_LABELS,
            {**THREE, "annotated": {"CT": ["a", "b"], "MR": ["b"], "US": ["c"]}},
            "other labels are annotated for CT than those that the model learned",
        ),
        (
            NEW_LABELS,
            {**THREE, "annotated": {"CT": ["a"], "MR": ["b", "c"], "US": ["a", "c"]}},
            "other labels are annotated for MR .* Only the new modality may bring labels",
        ),
    ],
)
def test_datasets_that_do_not_continue_the_model(
    labels: dict[str, Any], diffext: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = trained()
    write(labels, diffext)
    with pytest.raises(ModalityError, match=message):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_dataset_with_plans_of_its_own(tmp_path: Path, nnunet_folders: dict[str, Path]) -> None:
    """What ``nnUNetv2_plan_and_preprocess`` makes of it: reported before a model is written that nothing can train."""
    folder, _ = trained()
    file = nnunet_folders["nnUNet_preprocessed"] / MORE / "nnUNetPlans.json"
    file.write_text(json.dumps(make_plans("2d-shallow")))
    with pytest.raises(ModalityError, match="patch_size differ .*\n  nnUNetv2_move_plans_between_datasets -s .* -t "):
        grown(folder, tmp_path)
    file.unlink()
    with pytest.raises(ModalityError, match="there is no .*nnUNetPlans.json"):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_channel_that_is_normalised_in_another_way(tmp_path: Path, nnunet_folders: dict[str, Path]) -> None:
    """A model of CT alone, and CT with US: merged, their channel is no longer called CT."""
    folder, _ = trained()
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"0": "CT"}}))
    with pytest.raises(ModalityError, match=r"for the channel 'CT' \(CTNormalization\), which does not suit"):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_folds_go_on_from_those_of_the_model(
    tmp_path: Path, nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model was trained on must not validate it later."""
    folder, trainer = trained()
    splits = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["ct_0", "mr_0"], "val": ["ct_1", "mr_1"]}]))
    more = nnunet_folders["nnUNet_preprocessed"] / MORE
    for case in NEW_CASES:
        (more / "nnUNetPlans_tiny" / f"{case}.b2nd").touch()
    assert main(["add_modality", "-m", str(folder), "-d", "998", "-o", str(tmp_path / "larger")]) == 0
    assert f"Wrote {more / 'splits_final.json'}: the folds of" in capsys.readouterr().out
    (fold,) = json.loads((more / "splits_final.json").read_text())
    assert {"ct_0", "mr_0"} < set(fold["train"]) and {"ct_1", "mr_1"} <= set(fold["val"])
    (more / "splits_final.json").write_text(json.dumps([{"train": ["ct_1", "us_0"], "val": ["ct_0", "us_1"]}]))
    assert main(["add_modality", "-m", str(folder), "-d", "998", "-o", str(tmp_path / "another")]) == 1
    assert "validates on 1 cases that the model was trained on, the first is ct_0" in capsys.readouterr().err
    assert not (tmp_path / "another").exists()


def test_models_of_other_methods(tmp_path: Path) -> None:
    folder = finish(ready(base="M4oEPretrainTrainer"))
    with pytest.raises(ValueError, match="is no model of M4oETrainer"):
        grown(folder, tmp_path)


def test_dataset_that_is_not_preprocessed(tmp_path: Path) -> None:
    folder, _ = trained()
    with pytest.raises(ValueError, match="997"):
        add_modality(folder, 997, tmp_path / "larger", [0])


def test_larger_model_on_other_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained()
    growth = grown(folder, tmp_path)
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(growth.folder))
    plans = {**make_plans("2d-shallow"), "dataset_name": MORE}
    trainer = find_trainer(growth.trainer)(plans, "2d", 0, make_dataset_json(NEW_LABELS, 1, THREE), torch.device("cpu"))
    with pytest.raises(StageError, match="was trained with other plans: patch_size differ"):
        trainer.initialize()
