"""What ``nnunet_diffext merge`` makes: labels, files, modalities, splits; and that stock nnU-Net takes it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from merging import CT, DIRECTION, MR, SHAPE, change, edit_json, make_sources, merge, set_voxel, snapshot, voxels
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.merge import merge_datasets
from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.data.splits import Split, load_split
from synthetic import make_raw_dataset

UNION = {"background": 0, "liver": 1, "spleen": 2, "tumour": 3, "ignore": 4}
NEW_VALUES = np.array([0, 2, 3, 4])  # of the MR dataset's background, spleen, tumour, ignore


@pytest.fixture
def sources(nnunet_folders: dict[str, Path]) -> tuple[Path, Path]:
    return make_sources(nnunet_folders["nnUNet_raw"])


def write_splits(preprocessed: Path, name: str, folds: list[tuple[list[str], list[str], list[str]]]) -> None:
    (preprocessed / name).mkdir()
    keys = ("train", "val", "unlabeled")
    content = [{k: ids for k, ids in zip(keys, fold, strict=True) if ids} for fold in folds]
    (preprocessed / name / "splits_final.json").write_text(json.dumps(content))


def test_dataset_json(sources: tuple[Path, Path]) -> None:
    report = merge()
    assert report.folder.name == "Dataset020_All"
    content = json.loads((report.folder / "dataset.json").read_text())
    assert content == report.dataset_json
    assert content["labels"] == UNION and list(content["labels"].values()) == [0, 1, 2, 3, 4]
    assert content["channel_names"] == {"0": "image"}
    assert (content["numTraining"], content["file_ending"]) == (4, ".nii.gz")
    assert "overwrite_image_reader_writer" not in content
    ct, mr = (f"{n}_case_00{i}" for n in ("001",) for i in (0, 1)), (f"002_case_00{i}" for i in (0, 1))
    modality = dict.fromkeys([*ct, "001_extra_000"], "CT") | dict.fromkeys(mr, "MR")
    annotated = {"CT": ["liver", "spleen"], "MR": ["spleen", "tumour"]}
    assert content["diffext"] == {
        "modalities": modality,
        "annotated": annotated,
        "merged_from": {"001": CT, "002": MR},
    }
    found = modalities_of(content)
    assert found.names == ("CT", "MR") and found.heads == ("background", "liver", "spleen", "tumour")
    assert found.annotated("002_case_001") == (True, False, True, True) == found.classes("MR")


def test_new_values_on_the_same_grid_in_the_smallest_type(sources: tuple[Path, Path]) -> None:
    merged = merge().folder / "labelsTr"
    for index in range(2):
        before, after = (
            sitk.ReadImage(str(f))
            for f in (sources[1] / f"labelsTr/case_00{index}.nii.gz", merged / f"002_case_00{index}.nii.gz")
        )
        old, new = sitk.GetArrayFromImage(before), sitk.GetArrayFromImage(after)
        assert set(np.unique(old)) >= {1, 3} and np.array_equal(new, NEW_VALUES[old])
        assert after.GetDirection() == before.GetDirection() == pytest.approx(DIRECTION)
        assert (after.GetOrigin(), after.GetSpacing()) == (before.GetOrigin(), before.GetSpacing())
        assert after.GetPixelID() == sitk.sitkUInt8
        assert not (merged / f"002_case_00{index}.nii.gz").is_symlink()


def test_what_stays_the_same_is_linked_and_the_links_move_with_the_folder(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    before = snapshot(sources[0].parent)
    folder = merge().folder
    links = [f for f in folder.rglob("*.nii.gz") if f.is_symlink()]
    assert len(links) == 4 + 2 + 1  # images, labels of CT, the unlabelled image
    moved = tmp_path / "elsewhere" / "raw"
    shutil.copytree(folder.parent, moved, symlinks=True)
    shutil.rmtree(folder.parent)
    for link in links:
        now = moved / link.relative_to(folder.parent)
        assert not os.path.isabs(os.readlink(now))
        number, case = now.name.split("_", 1)
        source = CT if number == "001" else MR
        assert now.read_bytes() == before[f"{source}/{now.parent.name}/{case}"]


def test_copies(sources: tuple[Path, Path]) -> None:
    folder = merge(copy=True).folder
    assert not any(f.is_symlink() for f in folder.rglob("*"))
    image = Path("imagesTr") / "case_000_0000.nii.gz"
    assert (folder / f"imagesTr/001_{image.name}").read_bytes() == (sources[0] / image).read_bytes()


@pytest.mark.slow  # nnU-Net starts processes, which import torch
def test_stock_nnunet_checks_and_plans_it(nnunet_folders: dict[str, Path]) -> None:
    make_sources(nnunet_folders["nnUNet_raw"], shape=(12, 16, 16))
    report = merge()
    verify_dataset_integrity(str(report.folder), 1)
    extract_fingerprint_dataset(20, num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiment_dataset(20)
    folder = nnunet_folders["nnUNet_preprocessed"] / "Dataset020_All"
    plans = PlansManager(str(folder / "nnUNetPlans.json"))
    assert plans.get_configuration("3d_fullres").normalization_schemes == ["ZScoreNormalization"]
    copied = json.loads((folder / "dataset.json").read_text())
    assert plans.get_label_manager(copied).num_segmentation_heads == 4
    assert list(copied["diffext"]["modalities"].items()) == list(report.dataset_json["diffext"]["modalities"].items())


def test_two_datasets_of_one_modality(sources: tuple[Path, Path]) -> None:
    make_raw_dataset(sources[0].parent, 3, "Spleens", cases=1, shape=SHAPE, labels={"background": 0, "spleen": 1})
    content = merge(("MR", "CT", "CT"), (2, 1, 3)).dataset_json
    # A case is listed where it has less than its modality.
    expected = {"MR": ["spleen", "tumour"], "CT": ["spleen", "liver"], "003_case_000": ["spleen"]}
    assert content["diffext"]["annotated"] == expected
    assert list(content["labels"]) == ["background", "spleen", "tumour", "liver", "ignore"]
    found = modalities_of(content)
    assert found.names == ("MR", "CT")
    assert found.annotated("003_case_000") == (True, True, False, False)
    assert found.annotated("001_case_000") == (True, True, False, True) == found.classes("CT")


def test_mapping_renames_joins_drops_and_ignores(sources: tuple[Path, Path]) -> None:
    labels = {CT: {"liver": "spleen"}, MR: {"spleen": None, "tumour": "lesion"}}
    report = merge(labels=labels)
    assert report.dataset_json["labels"] == {"background": 0, "spleen": 1, "lesion": 2, "ignore": 3}
    # The dropped label is background in the file and counts as never annotated.
    assert report.dataset_json["diffext"]["annotated"] == {"CT": ["spleen"], "MR": ["lesion"]}
    assert report.classes == {CT: ("spleen",), MR: ("lesion",)}
    for source, name, values in ((sources[0], "001_case_000", [0, 1, 1]), (sources[1], "002_case_000", [0, 0, 2, 3])):
        old = voxels(source / "labelsTr" / "case_000.nii.gz")
        assert np.array_equal(voxels(report.folder / "labelsTr" / f"{name}.nii.gz"), np.array(values)[old])


def test_a_label_can_become_the_ignore_label(sources: tuple[Path, Path]) -> None:
    make_raw_dataset(sources[0].parent, 3, "Other", cases=1, shape=SHAPE, labels={"background": 0, "spleen": 1})
    report = merge(("CT", "MR"), (1, 3), labels={CT: {"liver": "ignore"}})
    assert report.dataset_json["labels"] == {"background": 0, "spleen": 1, "ignore": 2}
    assert report.dataset_json["diffext"]["annotated"] == {"CT": ["spleen"], "MR": ["spleen"]}
    old = voxels(sources[0] / "labelsTr/case_001.nii.gz")
    assert np.array_equal(voxels(report.folder / "labelsTr/001_case_001.nii.gz"), np.array([0, 2, 1])[old])


def test_what_a_source_says_about_its_own_cases_is_kept(sources: tuple[Path, Path]) -> None:
    own = {"modalities": {"case_000": "x", "case_001": "x"}, "annotated": {"case_001": ["tumour"]}}
    edit_json(sources[1], diffext=own)
    annotated = merge().dataset_json["diffext"]["annotated"]
    assert annotated == {"CT": ["liver", "spleen"], "MR": ["spleen", "tumour"], "002_case_001": ["tumour"]}


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (["CT"], ["CT"], ["CT"]),
        (["CT"], ["MR"], ["image"]),
        (["T1", "T2"], ["T1", "FLAIR"], ["T1", "image1"]),
        (["CT"], ["ct"], ["CT"]),
        (["noNorm"], ["NoNorm"], ["noNorm"]),
        (["noNorm"], ["CT"], ["image"]),
    ],
)
def test_channel_names(nnunet_folders: dict[str, Path], first: list[str], second: list[str], merged: list[str]) -> None:
    for folder, names in zip(
        make_sources(nnunet_folders["nnUNet_raw"], channels=len(first)), (first, second), strict=True
    ):
        edit_json(folder, channel_names={str(i): name for i, name in enumerate(names)})
    assert list(merge().dataset_json["channel_names"].values()) == merged


def test_explicit_file_lists_outside_of_the_folder(sources: tuple[Path, Path], tmp_path: Path) -> None:
    ct = sources[0]
    outside = shutil.move(ct / "imagesTr", tmp_path / "outside")
    listed = {
        f"patient{i}": {"images": [f"{outside}/case_00{i}_0000.nii.gz"], "label": f"labelsTr/case_00{i}.nii.gz"}
        for i in range(2)
    }
    edit_json(ct, dataset=listed)
    folder = merge().folder
    link = folder / "imagesTr" / "001_patient1_0000.nii.gz"
    assert Path(os.readlink(link)) == outside / "case_001_0000.nii.gz" and link.is_file()
    assert (folder / "labelsTr" / "001_patient1.nii.gz").resolve() == (ct / "labelsTr/case_001.nii.gz").resolve()


def test_other_formats_are_converted_with_their_geometry(sources: tuple[Path, Path]) -> None:
    mr = sources[1]
    before = {f: (sitk.ReadImage(str(f)), f.name) for f in sorted(mr.glob("*Tr/*.nii.gz"))}
    for file in before:
        change(file, lambda image: image, ".nrrd")
    edit_json(mr, file_ending=".nrrd")
    folder = merge(sources=(2, 1), modalities=("MR", "CT")).folder
    assert json.loads((folder / "dataset.json").read_text())["file_ending"] == ".nii.gz"
    for file, (image, name) in before.items():
        new = sitk.ReadImage(str(folder / file.parent.name / f"002_{name}"))
        assert new.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)
        assert (new.GetOrigin(), new.GetSpacing()) == (image.GetOrigin(), image.GetSpacing())
        if file.parent.name == "imagesTr":
            assert new.GetPixelID() == image.GetPixelID() == sitk.sitkFloat32
            assert np.array_equal(sitk.GetArrayFromImage(new), sitk.GetArrayFromImage(image))
    assert (folder / "imagesTr" / "001_case_000_0000.nii.gz").is_symlink()


def test_splits_are_merged_fold_by_fold(sources: tuple[Path, Path], nnunet_folders: dict[str, Path]) -> None:
    a, b, extra = "case_000", "case_001", "extra_000"
    preprocessed = nnunet_folders["nnUNet_preprocessed"]
    write_splits(preprocessed, CT, [([a], [b], [extra]), ([b], [a], [])])
    write_splits(preprocessed, MR, [([b], [a], []), ([a], [b], [])])
    report = merge()
    assert report.splits == preprocessed / "Dataset020_All" / "splits_final.json"
    assert load_split(report.splits.parent, 0) == Split(
        ("001_case_000", "002_case_001"), ("001_case_001", "002_case_000"), ("001_extra_000",)
    )
    assert json.loads(report.splits.read_text())[1] == {
        "train": ["001_case_001", "002_case_000"],
        "val": ["001_case_000", "002_case_001"],
    }


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (None, "0 in Dataset002_Tumours"),
        ([(["case_000"], ["case_001"], [])] * 2, "2 in Dataset002_Tumours"),
        ([(["case_000"], ["case_009"], [])], "names ['case_009'], which nnUNet_raw does not have"),
    ],
)
def test_splits_that_do_not_fit(sources, nnunet_folders: dict[str, Path], folds: list | None, message: str) -> None:
    write_splits(nnunet_folders["nnUNet_preprocessed"], CT, [(["case_000"], ["case_001"], [])])
    if folds is not None:
        write_splits(nnunet_folders["nnUNet_preprocessed"], MR, folds)
    report = merge()
    assert report.splits is None and message in report.splits_note and "nnU-Net will make its own" in report.splits_note
    assert not (nnunet_folders["nnUNet_preprocessed"] / "Dataset020_All").exists()


def test_natural_images(nnunet_folders: dict[str, Path]) -> None:
    folders = make_sources(nnunet_folders["nnUNet_raw"], shape=(12, 16))
    for folder in folders:
        for file in folder.glob("*T?/*.nii.gz"):
            change(file, lambda image: sitk.Cast(image, sitk.sitkUInt8), ".png")
        edit_json(folder, file_ending=".png")
    merged = merge().folder
    old = voxels(folders[1] / "labelsTr" / "case_000.png")
    assert np.array_equal(voxels(merged / "labelsTr" / "002_case_000.png"), NEW_VALUES[old])
    assert (merged / "imagesTu" / "001_extra_000_0000.png").is_symlink()


def test_worker_processes_do_the_same(sources: tuple[Path, Path]) -> None:
    one = snapshot(merge().folder)
    again = merge_datasets((CT, MR), ("CT", "MR"), 21, "All", num_processes=2, show_progress=False)
    assert snapshot(again.folder) == one


# -------------------------------------------------------------------------------------------------------- the command


def test_verb(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = tmp_path / "labels.json"
    mapping.write_text(json.dumps({MR: {"tumour": "lesion"}}))
    words = ["merge", "-d", "1", MR, "-o", "20", "--name", "All", "--modality", "CT", "MR", "-np", "1"]
    assert main([*words, "--labels", str(mapping)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["source", "modality", "cases", "unlabelled", "test", "annotated", "labels"]
    assert printed[1].split() == [CT, "CT", "2", "1", "0", "liver,", "spleen"]
    assert printed[2].split() == [MR, "MR", "2", "0", "0", "spleen,", "lesion"]
    assert "labels: background 0, liver 1, spleen 2, lesion 3, ignore 4" in printed
    assert "channel 0: image (was CT, MR), normalised by ZScoreNormalization" in printed
    assert [line.strip() for line in printed[-4:]] == [
        "nnUNetv2_plan_and_preprocess -d 20 --verify_dataset_integrity",
        "nnunet_diffext preprocess_unlabeled -d 20",
        "nnUNetv2_train 20 3d_fullres 0 -tr M4oEPretrainTrainer",
        "nnUNetv2_train 20 3d_fullres 0 -tr M4oETrainer",
    ]


def test_verb_says_what_is_wrong(sources: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    set_voxel(sources[1] / "labelsTr" / "case_000.nii.gz", 9)
    words = ["merge", "-d", "1", "2", "-o", "20", "--name", "All", "--modality", "CT", "MR", "-np", "1"]
    assert main(words) == 1
    assert "nnunet_diffext merge: error: 1 case(s) cannot be merged" in capsys.readouterr().err
