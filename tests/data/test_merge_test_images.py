"""Test images and their references travel into the merged dataset, and are scored there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from merging import CT, MR, change, edit_json, make_sources, merge, set_voxel, voxels

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.modalities import modalities_of

NEW_VALUES = np.array([0, 2, 3, 4])  # of the MR dataset's background, spleen, tumour, ignore


@pytest.fixture
def sources(nnunet_folders: dict[str, Path]) -> tuple[Path, Path]:
    """Test images of both, called new_0 and new_1; one of CT has no reference."""
    folders = make_sources(nnunet_folders["nnUNet_raw"])
    for folder in folders:
        for kind in ("images", "labels"):
            (folder / f"{kind}Ts").mkdir()
            for file in (folder / f"{kind}Tr").iterdir():
                shutil.copy(file, folder / f"{kind}Ts" / file.name.replace("case_00", "new_"))
    (folders[0] / "labelsTs" / "new_1.nii.gz").unlink()
    return folders


def files_in(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def test_files(sources: tuple[Path, Path]) -> None:
    folder = merge().folder
    assert files_in(folder / "imagesTs") == [f"00{n}_new_{i}_0000.nii.gz" for n in (1, 2) for i in (0, 1)]
    assert all(f.is_symlink() and f.is_file() for f in folder.glob("imagesTs/*"))
    assert files_in(folder / "labelsTs") == ["001_new_0.nii.gz", "002_new_0.nii.gz", "002_new_1.nii.gz"]
    old = voxels(sources[1] / "labelsTs/new_0.nii.gz")
    assert np.array_equal(voxels(folder / "labelsTs/002_new_0.nii.gz"), NEW_VALUES[old])
    assert len(files_in(folder / "imagesTr")) == 4


def test_a_test_case_with_the_name_of_another_case(sources: tuple[Path, Path]) -> None:
    """Results are looked up by name: of two cases, never the same one. ``new_1`` of this source goes with it."""
    for file in sources[1].glob("*Ts/new_0*"):
        file.rename(file.with_name(file.name.replace("new_0", "case_000")))
    content = merge().dataset_json["diffext"]
    folder = sources[1].parent / "Dataset020_All"
    assert files_in(folder / "labelsTs")[1:] == ["002_test_case_000.nii.gz", "002_test_new_1.nii.gz"]
    assert {"001_new_0", "002_case_000", "002_test_case_000"} <= set(content["modalities"])
    (sources[0] / "imagesTs" / "new_0_0000.nii.gz").rename(sources[0] / "imagesTs" / "extra_000_0000.nii.gz")
    shutil.rmtree(folder)
    merge()
    assert files_in(folder / "imagesTs")[:2] == ["001_test_extra_000_0000.nii.gz", "001_test_new_1_0000.nii.gz"]


# ------------------------------------------------------------------------------------------------ what is annotated


def test_what_was_looked_for(sources: tuple[Path, Path]) -> None:
    """Unless a file says so, what any training case has."""
    own = {
        "modalities": dict.fromkeys(("case_000", "case_001", "new_0"), "x"),
        "annotated": {"new_0": ["tumour"], "case_001": ["tumour"]},
    }
    edit_json(sources[1], diffext=own)
    content = merge().dataset_json
    found = modalities_of(content)
    assert found.modality("001_new_1") == "CT" and found.modality("002_new_1") == "MR"
    assert found.annotated("002_new_1") == (True, False, True, True)
    assert content["diffext"]["annotated"]["002_new_0"] == content["diffext"]["annotated"]["002_case_001"] == ["tumour"]


def test_what_no_training_case_has_is_not_asked(sources: tuple[Path, Path]) -> None:
    """A test case must not give a modality a head that nothing teaches."""
    own = {"modalities": dict.fromkeys(("case_000", "case_001", "new_0"), "x"), "annotated": {"x": ["tumour"]}}
    edit_json(sources[1], diffext={**own, "annotated": {**own["annotated"], "new_0": ["spleen", "tumour"]}})
    content = merge().dataset_json
    assert content["diffext"]["annotated"] == {"CT": ["liver", "spleen"], "MR": ["tumour"]}
    shutil.rmtree(sources[0].parent / "Dataset020_All")
    edit_json(sources[1], diffext={**own, "annotated": {**own["annotated"], "new_0": ["spleen"]}})
    report = merge()
    assert report.dataset_json["diffext"]["annotated"] == content["diffext"]["annotated"]
    assert files_in(report.folder / "labelsTs") == ["001_new_0.nii.gz", "002_new_1.nii.gz"], "nothing left to score"
    assert len(files_in(report.folder / "imagesTs")) == 4


def test_of_two_sources_of_one_modality(sources: tuple[Path, Path]) -> None:
    annotated = merge(("CT", "CT")).dataset_json["diffext"]["annotated"]
    assert annotated.pop("CT") == ["liver", "spleen", "tumour"]
    cases = [f"{kind}{i}" for kind in ("case_00", "new_") for i in (0, 1)]
    assert annotated == {
        **{f"001_{case}": ["liver", "spleen"] for case in cases},
        **{f"002_{case}": ["spleen", "tumour"] for case in cases},
    }


# ------------------------------------------------------------------------------------------------ odd folders


def test_other_things_in_the_folder(sources: tuple[Path, Path]) -> None:
    for name in ("._new_0_0000.nii.gz", ".DS_Store", "README.md"):
        (sources[0] / "imagesTs" / name).touch()
    for file in sources[1].glob("imagesTs/*"):
        file.rename(file.with_name(f".{file.name}"))
    folder = merge().folder
    assert files_in(folder / "imagesTs") == ["001_new_0_0000.nii.gz", "001_new_1_0000.nii.gz"]
    assert files_in(folder / "labelsTs") == ["001_new_0.nii.gz"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("new_0_0000.nii.gz", "new_0.nii.gz", "new_0.nii.gz: is not called"),
        ("new_0_0000.nii.gz", "new_1_0001.nii.gz", r"new_1: has 2 file\(s\), a training case 1"),
    ],
)
def test_wrong_names(sources: tuple[Path, Path], old: str, new: str, message: str) -> None:
    folder = sources[1] / "imagesTs"
    (folder / old).rename(folder / new)
    with pytest.raises(ValueError, match=rf"(?s){message}.*Or move {folder} away"):
        merge()


def test_values_that_a_source_does_not_know(sources: tuple[Path, Path]) -> None:
    set_voxel(sources[1] / "labelsTs" / "new_0.nii.gz", 9)
    with pytest.raises(ValueError, match=r"labelsTs/new_0.nii.gz: holds 9"):
        merge()
    assert not (sources[0].parent / "Dataset020_All").exists()


# ------------------------------------------------------------------------------------------------ the commands


def test_references_of_a_source_are_noticed(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = merge().folder
    predicted, right, wrong = (tmp_path / name for name in ("predicted", "right", "wrong"))
    cases = ("002_new_0.nii.gz", "002_new_1.nii.gz")
    for target in (predicted, right, wrong):
        target.mkdir()
        for case in cases:
            file = sources[1] / "labelsTs" / case[4:] if target is wrong else folder / "labelsTs" / case
            sitk.WriteImage(sitk.ReadImage(str(file)), str(target / case))
    (predicted / "dataset.json").write_text((folder / "dataset.json").read_text())
    words = ["evaluate", "-pred", str(predicted), "-np", "1", "-gt"]
    assert main([*words, str(right)]) == 0
    assert "the reference holds" not in "".join(capsys.readouterr())
    assert main([*words, str(wrong)]) == 0
    note = "note: 002_new_0, 002_new_1: the reference holds 'liver', not annotated here according to dataset.json"
    assert note in "".join(capsys.readouterr())


def test_the_table_counts_them_and_names_the_format(
    sources: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for file in sorted(sources[1].glob("*T?/*.nii.gz")):
        change(file, lambda image: image, ".nrrd")
    edit_json(sources[1], file_ending=".nrrd")
    words = ["merge", "-d", "1", "2", "-o", "20", "--name", "All", "--modality", "CT", "MR", "-np", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["source", "modality", "cases", "unlabelled", "test", "annotated", "labels"]
    assert printed[1].split()[:7] == [CT, "CT", "2", "1", "2", "(1", "with"]
    assert printed[2].split()[:7] == [MR, "MR", "2", "0", "2", "(2", "with"]
    assert f"format: .nii.gz, also for images to predict; converted: {MR} (.nrrd)" in printed
    assert (sources[0].parent / "Dataset020_All" / "imagesTs" / "002_new_1_0000.nii.gz").is_file()
