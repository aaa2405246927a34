from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.splits import Split, labeled_count, load_split, write_semisupervised_split
from synthetic import make_raw_dataset

IDS = [f"case_{i:03d}" for i in range(7)]


def stock_split(tiny, fold: int) -> tuple[list[str], list[str]]:
    """What stock nnU-Net trains and validates on."""
    plans = json.loads((tiny.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((tiny.preprocessed / "dataset.json").read_text())
    return nnUNetTrainer(plans, "3d_fullres", fold, dataset_json, torch.device("cpu")).do_split()


def write_splits(folder: Path, splits: object) -> Path:
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return folder


@pytest.mark.parametrize(
    ("labeled", "available", "expected"),
    [
        (4, 80, 4),
        ("4", 80, 4),
        ("5%", 80, 4),
        ("1%", 250, 3),
        ("10%", 64, 6),
        ("0.1%", 7, 1),
        ("100%", 7, 7),
        ("2.5%", 100, 3),
    ],
)
def test_labeled_count(labeled, available, expected) -> None:
    assert labeled_count(labeled, available) == expected


@pytest.mark.parametrize("labeled", [0, -1, "0%", "101%", "few", "", "2.5", "%", "1/0"])
def test_labeled_count_rejects(labeled) -> None:
    with pytest.raises(ValueError, match="neither a positive number"):
        labeled_count(labeled, 10)


def test_more_labeled_cases_than_there_are(tiny) -> None:
    with pytest.raises(ValueError, match="6 labelled cases asked for, but the fold has only 5 training cases"):
        write_semisupervised_split(951, 6)
    assert not (tiny.preprocessed / "splits_final.json").exists()


def test_the_standard_folds_are_those_of_nnunet_and_it_reads_the_result(tiny) -> None:
    standard = [stock_split(tiny, fold) for fold in range(5)]
    (tiny.preprocessed / "splits_final.json").unlink()
    report = write_semisupervised_split("Dataset951_Tiny", 2)
    assert report.backup is None and list(report.folds) == [0, 1, 2, 3, 4]
    for fold, (train, val) in enumerate(standard):
        split = load_split(tiny.preprocessed, fold)
        assert split == report.folds[fold]
        assert list(split.val) == val
        assert list(split.train) == sorted(train)[:2] and list(split.unlabeled) == sorted(train)[2:]
        assert stock_split(tiny, fold) == (list(split.train), list(split.val))


def test_before_preprocessing_the_raw_cases_are_split(tiny) -> None:
    expected = write_semisupervised_split(951, 2).folds
    (tiny.preprocessed / "splits_final.json").unlink()
    for folder in ("nnUNetPlans_2d", "nnUNetPlans_3d_fullres"):
        shutil.rmtree(tiny.preprocessed / folder)
    assert write_semisupervised_split(951, 2).folds == expected


def test_plans_with_different_cases(tiny) -> None:
    for file in (tiny.preprocessed / "nnUNetPlans_2d").glob("case_003*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"different cases \(only in one of them: \['case_003'\]\)"):
        write_semisupervised_split(951, 2)


def test_seed(tiny) -> None:
    def draw(number: int, seed: int | None) -> dict[int, Split]:
        return write_semisupervised_split(951, number, seed=seed, overwrite=True).folds

    first = draw(2, None)
    draws = [draw(2, seed) for seed in range(5)]
    assert draws[3] == draw(2, 3)
    assert any(d != first for d in draws)
    more = draw(4, 3)
    for fold in range(5):
        assert set(draws[3][fold].train) < set(more[fold].train)
        assert {*draws[3][fold].train, *draws[3][fold].unlabeled} == {*first[fold].train, *first[fold].unlabeled}
        assert list(more[fold].train) == sorted(more[fold].train)


def test_existing_file_is_kept_unless_asked_and_then_backed_up(tiny) -> None:
    file = tiny.preprocessed / "splits_final.json"
    custom = [
        {"train": ["case_005", "case_001", "case_003"], "val": ["case_000"], "note": "ours"},
        {"train": IDS[1:], "val": IDS[:1]},
    ]
    write_splits(tiny.preprocessed, custom)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="exists already.*--overwrite"):
        write_semisupervised_split(951, 1)
    assert file.read_bytes() == before and len(list(tiny.preprocessed.glob("splits_final*"))) == 1

    report = write_semisupervised_split(951, 1, fold=0, overwrite=True)
    assert report.backup.read_bytes() == before
    changed = {"train": ["case_001"], "val": ["case_000"], "note": "ours", "unlabeled": ["case_003", "case_005"]}
    assert json.loads(file.read_text()) == [changed, custom[1]]

    # From 1 to 2 labels: those that were unlabelled are training cases too.
    second = write_semisupervised_split(951, 2, fold=0, overwrite=True)
    assert second.folds == {0: Split(("case_001", "case_003"), ("case_000",), ("case_005",))}
    assert second.backup != report.backup and report.backup.read_bytes() == before
    assert not [f for f in tiny.preprocessed.iterdir() if f.name.startswith(".")]


def test_labeled_cases_by_name(tiny) -> None:
    write_splits(tiny.preprocessed, [{"train": IDS[:5], "val": IDS[5:]}])
    report = write_semisupervised_split(951, labeled_cases=["case_004", "case_001"], overwrite=True)
    assert report.folds[0] == Split(("case_001", "case_004"), tuple(IDS[5:]), ("case_000", "case_002", "case_003"))
    for wrong, message in ((["case_006"], "case_006"), (["case_0", "case_0"], "more than once"), ([], "none given")):
        with pytest.raises(ValueError, match=message):
            write_semisupervised_split(951, labeled_cases=wrong, overwrite=True)


def test_validation_cases_by_name(tiny) -> None:
    report = write_semisupervised_split(951, 1, val_cases=["case_006", "case_005"])
    expected = Split(("case_000",), ("case_005", "case_006"), tuple(IDS[1:5]))
    assert report.folds == {0: expected} and len(json.loads(report.file.read_text())) == 1
    with pytest.raises(ValueError, match="'case_9'"):
        write_semisupervised_split(951, 1, val_cases=["case_9"], overwrite=True)
    write_splits(tiny.preprocessed, [{"train": IDS[:3], "val": IDS[3:5]}, {"train": IDS[:6], "val": IDS[6:]}])
    # Cases that the fold leaves out stay out.
    report = write_semisupervised_split(951, "40%", val_cases=["case_000"], fold=0, overwrite=True)
    assert report.folds == {0: Split(("case_001", "case_002"), ("case_000",), ("case_003", "case_004"))}


def test_images_without_labels_are_never_labeled(tiny) -> None:
    """Ids of ``imagesTu`` come first in the alphabet here; nothing is known of them."""
    images = ["aaa_000", "aaa_001"]
    write_splits(tiny.preprocessed, [{"train": IDS[:4], "val": IDS[4:], "unlabeled": images}])
    for labeled, seed in (("1", None), ("50%", None), ("2", 3)):
        split = write_semisupervised_split(951, labeled, seed=seed, overwrite=True).folds[0]
        assert set(split.train) <= set(IDS[:4]) and set(images) <= set(split.unlabeled)
    assert len(split.train) == 2, "a share counts cases that have a label"
    with pytest.raises(ValueError, match=r"\['aaa_000'\] are not among the 4 training cases"):
        write_semisupervised_split(951, labeled_cases=["aaa_000"], overwrite=True)


def test_wrong_calls(tiny) -> None:
    with pytest.raises(ValueError, match="either"):
        write_semisupervised_split(951)
    with pytest.raises(ValueError, match="either"):
        write_semisupervised_split(951, 2, labeled_cases=["case_000"])
    with pytest.raises(ValueError, match="--seed"):
        write_semisupervised_split(951, labeled_cases=["case_000"], seed=1)
    with pytest.raises(ValueError, match=r"5 folds \(0 to 4\); there is no fold 5"):
        write_semisupervised_split(951, 2, fold=5)
    with pytest.raises(ValueError, match="ID 777"):
        write_semisupervised_split(777, 2)


def test_too_few_cases_for_five_folds(nnunet_folders) -> None:
    raw = make_raw_dataset(nnunet_folders["nnUNet_raw"], 953, "Few", cases=3, shape=(4, 6, 6))
    with pytest.raises(FileNotFoundError, match="nnUNetv2_plan_and_preprocess -d 953"):
        write_semisupervised_split(953, 1)
    (nnunet_folders["nnUNet_preprocessed"] / raw.name).mkdir()
    with pytest.raises(ValueError, match="3 training cases, too few for nnU-Net's 5 folds.*--val"):
        write_semisupervised_split(953, 1)
    report = write_semisupervised_split(953, 1, val_cases=["case_002"])
    assert report.folds == {0: Split(("case_000",), ("case_002",), ("case_001",))}


def test_load_split_accepts_what_nnunet_accepts(tmp_path) -> None:
    write_splits(tmp_path, [{"train": ["b", "a"], "val": ["c"]}, {"train": ["a"], "val": ["a"]}])
    assert load_split(tmp_path, 0) == Split(("b", "a"), ("c",), ())
    assert load_split(tmp_path, 1) == Split(("a",), ("a",), ())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"train": ["a"], "val": ["b"], "unlabeled": ["c", "a"]},
            r"fold 1: \['a'\] are listed in 'unlabeled' and in 'train'",
        ),
        ({"train": ["a"], "val": ["b"], "unlabeled": ["b"]}, r"fold 1: \['b'\] are listed in 'unlabeled' and in 'val'"),
        ({"train": ["a", "a"], "val": ["b"]}, r"fold 1: 'train' lists \['a'\] more than once"),
        ({"train": ["a"], "val": ["b"], "unlabeled": ["c", "c"]}, r"fold 1: 'unlabeled' lists \['c'\] more than once"),
        ({"train": ["a"]}, r"fold 1: 'val' must be a list of case ids \(strings\), but is missing"),
        ({"train": ["a"], "val": [1]}, r"fold 1: 'val' must be"),
        ({"train": ["a"], "val": ["b"], "unlabeled": "c"}, r"fold 1: 'unlabeled' must be .* but is 'c'"),
        (["a"], r"fold 1: must be a dictionary"),
    ],
)
def test_load_split_rejects(tmp_path, entry, message) -> None:
    write_splits(tmp_path, [{"train": ["a"], "val": ["b"]}, entry])
    with pytest.raises(ValueError, match=message) as caught:
        load_split(tmp_path, 1)
    assert str(tmp_path / "splits_final.json") in str(caught.value)
    assert load_split(tmp_path, 0).train == ("a",)


def test_load_split_without_a_usable_file(tmp_path) -> None:
    folder = tmp_path / "Dataset042_X"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="nnunet_diffext split -d 42 --labeled"):
        load_split(folder, 0)
    for content in ("{", "{}", "[]"):
        (folder / "splits_final.json").write_text(content)
        with pytest.raises(ValueError, match="splits_final.json"):
            load_split(folder, 0)
    write_splits(folder, [{"train": ["a"], "val": ["b"]}])
    for fold in (1, -1, "all"):
        with pytest.raises(ValueError, match="fold"):
            load_split(folder, fold)


def test_command(tiny, capsys) -> None:
    assert main(["split", "-d", "951", "--labeled", "40%", "-f", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        "fold 1: 2 labelled, 4 unlabelled, 1 validation" in printed or "fold 1: 2 labelled, 3 unlabelled, 2" in printed
    )
    content = json.loads((tiny.preprocessed / "splits_final.json").read_text())
    assert ["unlabeled" in entry for entry in content] == [False, True, False, False, False]
    assert main(["split", "-d", "951", "--labeled", "2"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["split", "-d", "951", "--labeled", "99", "--overwrite"]) == 1
    assert "99 labelled cases asked for" in capsys.readouterr().err
    assert json.loads((tiny.preprocessed / "splits_final.json").read_text()) == content
    assert main(["split", "-d", "951", "--labeled-cases", "case_000", "--val", "case_006", "--overwrite"]) == 0
    assert "the old file is" in capsys.readouterr().out
    for wrong in (["--labeled", "2", "--labeled-cases", "case_000"], []):
        with pytest.raises(SystemExit, match="2"):
            main(["split", "-d", "951", *wrong])
