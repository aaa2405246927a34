"""A dataset that goes on from another one: what a model was trained on does not validate it later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nnunet_diffext.data.continued_split import continue_splits

OLD, NEW = "Dataset801_Old", "Dataset802_New"
IDS = [f"001_case_{i}" for i in range(6)]
MORE = [f"002_case_{i}" for i in range(5)]
FOLDS = [{"train": IDS[2:], "val": IDS[:2]}, {"train": [*IDS[:2], *IDS[4:]], "val": IDS[2:4]}]


@pytest.fixture(autouse=True)
def preprocessed(nnunet_folders: dict[str, Path]) -> Path:
    """Both datasets, the old one with its folds."""
    folder = nnunet_folders["nnUNet_preprocessed"]
    write_cases(folder / NEW, [*IDS, *MORE])
    (folder / OLD).mkdir()
    (folder / OLD / "splits_final.json").write_text(json.dumps(FOLDS))
    return folder


def write_cases(dataset: Path, cases: Sequence[str]) -> None:
    (dataset / "P_3d").mkdir(parents=True, exist_ok=True)
    plans = {"plans_name": "P", "configurations": {"3d": {"data_identifier": "P_3d"}}}
    (dataset / "P.json").write_text(json.dumps(plans))
    for case in cases:
        (dataset / "P_3d" / f"{case}.b2nd").touch()


def written(preprocessed: Path) -> list[dict[str, Any]]:
    return json.loads((preprocessed / NEW / "splits_final.json").read_text())


def test_folds_go_on(preprocessed: Path) -> None:
    said = continue_splits(OLD, NEW, [0, 1], "P")
    assert said.startswith("Wrote ") and OLD in said
    folds = written(preprocessed)
    assert len(folds) == len(FOLDS)
    for fold, before in zip(folds, FOLDS, strict=True):
        assert set(before["train"]) == set(fold["train"]) & set(IDS) and set(before["val"]) == set(fold["val"]) & set(
            IDS
        )
        assert sorted([*fold["train"], *fold["val"]]) == sorted([*IDS, *MORE])
    new = [set(fold["val"]) & set(MORE) for fold in folds]
    assert new[0] | new[1] == set(MORE) and not new[0] & new[1] and min(map(len, new)) == 2
    assert continue_splits(OLD, NEW, [0, 1], "P") == "", "as it should be"


def test_unlabelled_cases_stay_that(preprocessed: Path) -> None:
    split = {"train": IDS[3:], "val": IDS[:2], "unlabeled": [IDS[2], "001_extra"]}
    (preprocessed / OLD / "splits_final.json").write_text(json.dumps([split]))
    continue_splits(OLD, NEW, [0], "P")
    (fold,) = written(preprocessed)
    assert fold["unlabeled"] == split["unlabeled"] and IDS[2] not in [*fold["train"], *fold["val"]]


def test_single_new_case_is_trained_on(preprocessed: Path) -> None:
    for case in MORE[1:]:
        (preprocessed / NEW / "P_3d" / f"{case}.b2nd").unlink()
    continue_splits(OLD, NEW, [0], "P")
    assert all(MORE[0] in fold["train"] for fold in written(preprocessed))


def test_folds_that_validate_on_what_was_trained_on_are_refused(preprocessed: Path) -> None:
    """As nnU-Net draws them anew for the larger dataset."""
    mixed = [{"train": [*IDS[:4], *MORE[:3]], "val": [*IDS[4:], *MORE[3:]]}, FOLDS[1]]
    file = preprocessed / NEW / "splits_final.json"
    file.write_text(json.dumps(mixed))
    with pytest.raises(
        ValueError, match="fold 0 validates on 2 cases that the model was trained on, the first is 001_ca"
    ):
        continue_splits(OLD, NEW, [0], "P")
    assert json.loads(file.read_text()) == mixed
    assert continue_splits(OLD, NEW, [1], "P") == ""


def test_what_cannot_be_known_is_said(preprocessed: Path) -> None:
    (preprocessed / NEW / "P_3d" / f"{IDS[0]}.b2nd").unlink()
    assert f"1 of 6 cases of {OLD}, the first is {IDS[0]}, have another name" in continue_splits(OLD, NEW, [0], "P")
    assert f"{OLD} has no fold 2 in a splits_final.json" in continue_splits(OLD, NEW, [0, 2], "P"), "nnU-Net draws it"
    assert "has seen every case" in continue_splits(OLD, NEW, ["all"], "P")
    shutil.rmtree(preprocessed / OLD)
    assert f"{OLD} has no fold 0 in a splits_final.json" in continue_splits(OLD, NEW, [0], "P"), "of a copied model"
    assert not (preprocessed / NEW / "splits_final.json").exists()
