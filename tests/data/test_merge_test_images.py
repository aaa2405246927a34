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
    """Test images of both, numbered from 0 as the training images are; one of CT has no reference."""
    folders = make_sources(nnunet_folders["nnUNet_raw"])
    for folder in folders:
        for kind in ("images", "labels"):
            shutil.copytree(folder / f"{kind}Tr", folder / f"{kind}Ts")
    (folders[0] / "labelsTs" / "case_001.nii.gz").unlink()
    return folders


def test_files(sources: tuple[Path, Path]) -> None:
    folder = merge().folder
    names = sorted(f.name for f in folder.glob("imagesTs/*"))
    assert names == [f"00{n}_case_00{i}_0000.nii.gz" for n in (1, 2) for i in (0, 1)]
    assert all(f.is_symlink() and f.is_file() for f in folder.glob("imagesTs/*"))
    assert sorted(f.name for f in folder.glob("labelsTs/*")) == [
        "001_case_000.nii.gz", "002_case_000.nii.gz", "002_case_001.nii.gz"
    ]  # fmt: skip
    old = voxels(sources[1] / "labelsTs/case_000.nii.gz")
    assert np.array_equal(voxels(folder / "labelsTs/002_case_000.nii.gz"), NEW_VALUES[old])
    assert len([*folder.glob("imagesTr/*")]) == 4


def test_what_was_looked_for(sources: tuple[Path, Path]) -> None:
    (sources[1] / "imagesTs" / "case_001_0000.nii.gz").rename(sources[1] / "imagesTs" / "new_0000.nii.gz")
    (sources[1] / "labelsTs" / "case_001.nii.gz").rename(sources[1] / "labelsTs" / "new.nii.gz")
    own = {"modalities": {"case_000": "x", "case_001": "x"}, "annotated": {"case_001": ["tumour"]}}
    edit_json(sources[1], diffext=own)
    found = modalities_of(merge().dataset_json)
    assert found.modality("001_case_001") == "CT" and found.modality("002_new") == "MR"
    assert found.annotated("002_new") == (True, False, True, True)


def test_values_that_a_source_does_not_know(sources: tuple[Path, Path]) -> None:
    file = sources[1] / "labelsTs" / "case_000.nii.gz"
    set_voxel(file, 9)
    with pytest.raises(ValueError, match=r"labelsTs/case_000.nii.gz: holds 9"):
        merge()
    assert not (sources[0].parent / "Dataset020_All").exists()


def test_a_source_reference_is_noticed(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = merge().folder
    predicted, right, wrong = (tmp_path / name for name in ("predicted", "right", "wrong"))
    new, old = folder / "labelsTs" / "002_case_000.nii.gz", sources[1] / "labelsTs" / "case_000.nii.gz"
    for target, file in ((predicted, new), (right, new), (wrong, old)):
        target.mkdir()
        sitk.WriteImage(sitk.ReadImage(str(file)), str(target / "002_case_000.nii.gz"))
    (predicted / "dataset.json").write_text((folder / "dataset.json").read_text())
    words = ["evaluate", "-pred", str(predicted), "-np", "1", "-gt"]
    assert main([*words, str(right)]) == 0
    assert "nobody looked for" not in "".join(capsys.readouterr())
    assert main([*words, str(wrong)]) == 0
    assert "holds 'liver', but dataset.json says that nobody looked for it" in "".join(capsys.readouterr())


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
    assert printed[1].split()[:5] == [CT, "CT", "2", "1", "2"] and printed[2].split()[:5] == [MR, "MR", "2", "0", "2"]
    assert f"format: .nii.gz, also for images to predict; converted: {MR} (.nrrd)" in printed
    folder = sources[0].parent / "Dataset020_All"
    assert (folder / "imagesTs" / "002_case_001_0000.nii.gz").is_file()
