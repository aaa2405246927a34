"""What is wrong is said before any work starts, and a finished model in the same folder stays as it is."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace import MAIN, Workspace, train

NAME = "DMEDSegTrainer_1epochs_1iters_1valiters"


def edit(file: Path, change: Callable[[object], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def no_plans(folder: Path) -> None:
    (folder / "nnUNetPlans.json").unlink()


def no_data(folder: Path) -> None:
    shutil.rmtree(folder / "nnUNetPlans_3d_fullres")


def unlabeled_and_trained_on(folder: Path) -> None:
    edit(folder / "splits_final.json", lambda splits: splits[0]["unlabeled"].append("case_001"))


def unlabeled_and_validated_on(folder: Path) -> None:
    edit(folder / "splits_final.json", lambda splits: splits[0]["unlabeled"].append("case_004"))


def validated_on_image_in_unlabeled_folder(folder: Path) -> None:
    for file in (folder / "nnUNetPlans_3d_fullres").glob("case_004.*"):
        shutil.copy(file, folder / "nnUNetPlans_3d_fullres_unlabeled")


def unlabeled_without_data(folder: Path) -> None:
    edit(folder / "splits_final.json", lambda splits: splits[0]["unlabeled"].append("case_777"))


def images_of_other_plans(folder: Path) -> None:
    """Only the unlabelled ones are old; nnU-Net looks after its own."""
    for file in (folder / "nnUNetPlans_3d_fullres_unlabeled").glob("*.pkl"):
        properties = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps({**properties, "diffext_plans": "of last year"}))


def split_of_wrong_type(folder: Path) -> None:
    edit(folder / "splits_final.json", lambda splits: splits.clear() or splits.append({"train": "x", "val": []}))


def patch_that_strides_do_not_divide(folder: Path) -> None:
    edit(folder / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(patch_size=[12, 13, 12]))


def unknown_setting(folder: Path) -> None:
    edit(folder / "nnUNetPlans.json", lambda p: p.update(diffext={"DMEDSegTrainer": {"lambda_cak": 2.0}}))


def unknown_network(folder: Path) -> None:
    def change(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "no.such.Network"

    edit(folder / "nnUNetPlans.json", change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_plans, "nnUNetPlans.json"),
        (no_data, "nnUNetPlans_3d_fullres"),
        (unlabeled_and_trained_on, r"json, fold 0: \['case_001'\] are listed in 'unlabeled' and in 'train'"),
        (unlabeled_and_validated_on, r"fold 0: \['case_004'\] are listed in 'unlabeled' and in 'val'"),
        (validated_on_image_in_unlabeled_folder, r"holds \['case_004'\], which fold 0 uses as"),
        (unlabeled_without_data, r"\['case_777'\] are neither in .* Run nnUNetv2_preprocess -d 801"),
        (images_of_other_plans, r"2 images .* with other plans .*preprocess_unlabeled -d 801 -plans_name nnUNetPlans"),
        (split_of_wrong_type, "fold 0: 'train' must be a list"),
        (patch_that_strides_do_not_divide, r"Patch size \[12, 13, 12\] is not divisible .* to \[12, 12, 12\]"),
        (unknown_setting, r"Unknown setting\(s\) \['lambda_cak'\] .* Known: epochs, iterations"),
        (unknown_network, "no.such.Network"),
    ],
)
def test_refused_before_any_work(own_workspace: Workspace, damage: Callable[[Path], None], message: str) -> None:
    fold = own_workspace.model(MAIN, NAME) / "fold_0"
    fold.mkdir(parents=True)
    model = {fold / "checkpoint_final.pth": b"a model", fold.parent / "plans.json": b"its plans"}
    for file, content in model.items():
        file.write_bytes(content)
    damage(own_workspace.preprocessed(MAIN))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(MAIN, NAME)
    assert re.search(message, str(error.value)), str(error.value)
    assert all(file.read_bytes() == content for file, content in model.items())
    assert not list(fold.glob("checkpoint_latest.pth")) and not (fold / "progress.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DMEDSegTrainer_noCALC", r"Unknown token 'noCALC'[\s\S]*noCACL"),
        ("DMEDSegTrainer_cac0p5_noCACL", "both set 'lambda_cac'"),
        ("DMEDSegTrainer_copyPaste3", "must lie in"),
        ("DMEDSegTraine", "Could not find requested nnunet trainer DMEDSegTraine"),
        ("nnUNetTrainer_noCACL", "Could not find requested nnunet trainer nnUNetTrainer_noCACL"),
    ],
)
def test_wrong_names_leave_no_folder(
    own_workspace: Workspace, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(MAIN, name)
    assert not any((own_workspace.root / "nnUNet_results").iterdir())
    if name.startswith("nnUNetTrainer"):
        assert "Unknown token 'noCACL'" in capsys.readouterr().out


def test_cascade_whose_first_stage_was_not_trained(own_workspace: Workspace) -> None:
    """nnU-Net would find out in the middle of loading data."""
    name = f"{MAIN}/{NAME}__nnUNetPlans__3d_lowres/predicted_next_stage/3d_cascade_fullres"
    command = f"nnUNetv2_train {MAIN} 3d_lowres FOLD -tr {NAME} -p nnUNetPlans"
    with pytest.raises(FileNotFoundError) as error:
        train(MAIN, NAME, "3d_cascade_fullres")
    message = str(error.value)
    assert message.startswith("3 of 3 cases, the first is case_000, have no segmentation of 3d_lowres in ")
    assert name in message and message.endswith(command)
