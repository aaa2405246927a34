"""What ``nnunet_diffext merge`` refuses: with a way out, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
from merging import CT, MR, change, edit_json, make_sources, merge, set_voxel, snapshot

from nnunet_diffext.data import merge as module
from nnunet_diffext.data.image_checks import BadImagesError


class Sources:
    """The folders of both datasets."""

    def __init__(self, raw: Path) -> None:
        self.ct, self.mr = make_sources(raw)

    def label(self, source: str = "mr", case: int = 0) -> Path:
        return getattr(self, source) / "labelsTr" / f"case_00{case}.nii.gz"


@pytest.fixture
def sources(nnunet_folders: dict[str, Path]) -> Iterator[Sources]:
    """Whatever a test does, a refused merge leaves nothing in any of nnU-Net's folders, hidden or not."""
    found = Sources(nnunet_folders["nnUNet_raw"])
    yield found
    assert {f.name for f in nnunet_folders["nnUNet_raw"].iterdir()} <= {CT, MR, "Dataset020_Old"}
    assert [f.name for f in nnunet_folders["nnUNet_preprocessed"].iterdir() if "020" in f.name] == []


def refused(message: str, *, error: Any = ValueError, **kwargs: Any) -> str:
    with pytest.raises(error, match=message) as caught:
        merge(**kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"modalities": ("CT",)}, "2 datasets .*, but 1 modalities"),
        ({"modalities": ("CT", "MR", "MR")}, "2 datasets .*, but 3 modalities"),
        ({"modalities": ("CT", "MR T1")}, "'MR T1' is no name of a modality"),
        ({"sources": (1,), "modalities": ("CT",)}, "at least two different datasets"),
        ({"sources": (1, CT)}, "at least two different datasets"),
        ({"num_processes": 0}, "at least 1"),
        ({"labels": {"Dataset003_X": {}}}, "names 'Dataset003_X'; the datasets are 'Dataset001_Abdomen'"),
        ({"labels": {CT: {"lung": "liver"}}}, "no label 'lung' to map; it has 'liver', 'spleen'"),
        ({"labels": {MR: {"ignore": None}}}, "no label 'ignore' to map"),
        ({"labels": {MR: {"background": "x"}}}, "no label 'background' to map"),
        ({"labels": {CT: {"liver": "background"}}}, "'background' is no name of a class. Write a name, null"),
        ({"labels": {CT: {"liver": " "}}}, "is no name of a class"),
        ({"labels": {CT: {"liver": 1}}}, "is no name of a class"),
        ({"labels": {CT: ["liver"]}}, "must hold a dictionary per dataset, such as"),
        ({"labels": {MR: {"spleen": None, "tumour": "ignore"}}}, "No label of Dataset002_Tumours is left"),
    ],
)
def test_wrong_calls(sources: Sources, kwargs: dict[str, Any], message: str) -> None:
    refused(message, **kwargs)


@pytest.mark.parametrize(
    ("sources_", "target", "name", "message"),
    [
        ((1, 2), 1, "All", "1 is one of the datasets to merge"),
        ((1, 2), 0, "All", "between 1 and 999"),
        ((1, 2), 20, "All of it", "'All of it' is no name of a dataset"),
        ((1, 3), 20, "All", "3"),
    ],
)
def test_wrong_targets(sources: Sources, sources_: tuple[int, int], target: int, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.merge_datasets(sources_, ("CT", "MR"), target, name, num_processes=1)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_results"])
def test_a_number_that_is_taken(sources: Sources, nnunet_folders: dict[str, Path], variable: str) -> None:
    old = nnunet_folders[variable] / "Dataset020_Old"
    old.mkdir()
    refused("20 is taken by Dataset020_Old.*remove it from all three folders")
    assert old.is_dir() and not any(old.iterdir())


# ------------------------------------------------------------------------------------------------------------ labels


def test_other_spellings_come_with_a_mapping_that_settles_them(sources: Sources) -> None:
    edit_json(sources.mr, labels={"background": 0, "Spleen ": 1, "tumour": 2, "Ignore": 3})
    edit_json(sources.ct, labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3})
    message = refused("differ only in spelling: 'spleen', 'Spleen '; 'ignore', 'Ignore'", labels={CT: {"liver": "L"}})
    proposal = json.loads(message[message.index("\n{") :])
    assert proposal == {CT: {"liver": "L"}, MR: {"Spleen ": "spleen", "Ignore": "ignore"}}
    merged = merge(labels=proposal)
    assert list(merged.dataset_json["labels"]) == ["background", "L", "spleen", "tumour", "ignore"]
    shutil.rmtree(merged.folder)


def test_regions(sources: Sources) -> None:
    edit_json(sources.mr, labels={"background": 0, "whole": [1, 2], "tumour": 2}, regions_class_order=[1, 2])
    refused(f"{MR}: has regions \\('whole'\\).*give every value one name")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0}, "no label but background"),
        ({"background": 0, "a": 1, "b": 1}, "two names for one value"),
        ({"background": 0, "a": 1, "ignore": 1}, '"ignore" must have a value of its own'),
    ],
)
def test_labels_that_mean_nothing(sources: Sources, labels: dict[str, int], message: str) -> None:
    edit_json(sources.ct, labels=labels)
    refused(f"{CT}: .*{message}")


def test_values_that_nobody_declared_are_collected_also_in_files_that_are_only_linked(sources: Sources) -> None:
    set_voxel(sources.label("mr", 0), 7)
    set_voxel(sources.label("mr", 1), 1.5, sitk.sitkFloat32)
    # 3 is the tumour of the merged dataset.
    set_voxel(sources.label("ct", 1), 3)
    before = snapshot(sources.ct.parent)
    message = refused("3 case\\(s\\) cannot be merged; nothing was written")
    assert f"{sources.label('mr', 0)}: holds 7, but its dataset.json knows [0, 1, 2, 3] only" in message
    assert f"{sources.label('mr', 1)}: holds 1.5," in message
    assert f"{sources.label('ct', 1)}: holds 3, but its dataset.json knows [0, 1, 2] only" in message
    assert snapshot(sources.ct.parent) == before


def test_long_lists_are_cut(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN", 1)
    for case in range(2):
        set_voxel(sources.label("mr", case), 7)
    message = refused("2 case\\(s\\)")
    assert message.count("holds 7") == 1 and message.endswith("and 1 more")


# ------------------------------------------------------------------------------------------------------------- files


def test_missing_files(sources: Sources) -> None:
    sources.label("mr", 1).unlink()
    assert str(sources.label("mr", 1)) in refused(f"{MR}: 1 file\\(s\\) are missing. Add them, or remove their cases")
    shutil.rmtree(sources.ct / "imagesTr")
    refused("imagesTr does not exist", error=FileNotFoundError)
    (sources.ct / "dataset.json").unlink()
    refused("dataset.json does not exist.*merged from nnUNet_raw", error=FileNotFoundError)


def test_a_file_that_cannot_be_read_leaves_nothing_behind(sources: Sources) -> None:
    sources.label("mr", 1).write_bytes(b"no image")
    before = snapshot(sources.ct.parent)
    refused("1 case\\(s\\) cannot be merged.*\n  - 002_case_001: ")
    assert snapshot(sources.ct.parent) == before


def test_names_of_images(sources: Sources) -> None:
    (sources.ct / "imagesTu" / "extra_000_0000.nii.gz").rename(sources.ct / "imagesTu" / "case_001_0000.nii.gz")
    refused("already the id of a training case", error=BadImagesError)
    (sources.mr / "imagesTr" / "odd.nii.gz").touch()
    (sources.ct / "imagesTu" / "case_001_0000.nii.gz").rename(sources.ct / "imagesTu" / "extra_000_0000.nii.gz")
    refused("odd.nii.gz: is not called", error=BadImagesError)


def test_folders_without_links(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    refused("cannot make a link to .*Operation not permitted.*copy the files with --copy")


def test_splits_that_cannot_be_read(sources: Sources, nnunet_folders: dict[str, Path]) -> None:
    for name in (CT, MR):
        (nnunet_folders["nnUNet_preprocessed"] / name).mkdir()
        (nnunet_folders["nnUNet_preprocessed"] / name / "splits_final.json").write_text('[{"train": "case_000"}]')
    refused("fold 0: 'train' must be a list of case ids")


def png(source: Path) -> None:
    for file in source.glob("*T?/*.nii.gz"):
        change(file, lambda image: sitk.Cast(image[:, :, 0], sitk.sitkUInt8), ".png")
    edit_json(source, file_ending=".png")


def flat(source: Path) -> None:
    for file in source.glob("*T?/*.nii.gz"):
        change(file, lambda image: image[:, :, :1])


def two_channels(source: Path) -> None:
    for file in source.glob("images*/*_0000.nii.gz"):
        shutil.copy(file, str(file).replace("_0000.", "_0001."))
    edit_json(source, channel_names={"0": "T1", "1": "T2"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (png, "2D and 3D datasets cannot be merged .*png, 2D"),
        (flat, "2D and 3D datasets cannot be merged .*nii.gz, 2D"),
        (two_channels, "Dataset001_Abdomen has 1, Dataset002_Tumours has 2. Merge datasets with the same number only"),
        (lambda mr: edit_json(mr, channel_names={"0": "T1", "1": "T2"}), "names 2 channel.*, but case_000 has 1"),
        (lambda mr: edit_json(mr, channel_names=None), "has no channel_names"),
        (lambda mr: edit_json(mr, file_ending=None), "has no file_ending"),
        (lambda mr: edit_json(mr, file_ending=".mha"), "holds no file that ends in .mha"),
        (lambda mr: edit_json(mr, overwrite_image_reader_writer="NibabelIO"), "different classes .*NibabelIO"),
        (lambda mr: edit_json(mr, diffext={"modalities": {"case_000": "A", "case_001": "B"}}), "several modalities"),
        (lambda mr: edit_json(mr, diffext={"modalities": {"case_000": "A"}}), "no modality for the case 'case_001'"),
        (lambda mr: edit_json(mr, dataset={}), "lists no case"),
        (lambda mr: (mr / "imagesTr" / "case_000_0000.nii.gz").write_bytes(b"none"), "case_000 cannot be read"),
    ],
)
def test_datasets_that_do_not_fit(sources: Sources, damage: Callable[[Path], Any], message: str) -> None:
    damage(sources.mr)
    refused(message, error=(ValueError, FileNotFoundError))


def test_one_reader_for_all_is_kept(sources: Sources) -> None:
    for source in (sources.ct, sources.mr):
        edit_json(source, overwrite_image_reader_writer="NibabelIO")
    merged = merge()
    assert merged.dataset_json["overwrite_image_reader_writer"] == "NibabelIO"
    new, old = (sitk.ReadImage(str(f)) for f in (merged.folder / "labelsTr/002_case_000.nii.gz", sources.label("mr")))
    assert new.GetDirection() == pytest.approx(old.GetDirection()) and new.GetOrigin() == pytest.approx(old.GetOrigin())
    shutil.rmtree(merged.folder)
