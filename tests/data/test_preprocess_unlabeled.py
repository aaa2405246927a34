from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.image_checks import BadImagesError
from nnunet_diffext.data.parallel import PreprocessingError, run_all
from nnunet_diffext.data.unlabeled import made_with_other_plans, plans_fingerprint, preprocess_unlabeled
from synthetic import write_image

SHAPE, SPACING = (8, 10, 12), (1.0, 1.0, 1.0)
EXTRA = ("extra_000", "extra_001")


def preprocess(tiny, **kwargs):
    kwargs = {"configurations": ["3d_fullres"], "num_processes": 1, "show_progress": False, **kwargs}
    return preprocess_unlabeled(951, **kwargs)


def edit_plans(tiny, change) -> None:
    file = tiny.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    change(plans)
    file.write_text(json.dumps(plans))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_equals_what_nnunet_makes_of_the_same_image_with_an_empty_label(tiny, tmp_path, configuration) -> None:
    preprocess(tiny, configurations=[configuration])
    manager = tiny.plans.get_configuration(configuration)
    folder = tiny.preprocessed / f"{manager.data_identifier}_unlabeled"
    dataset_json = json.loads((tiny.raw / "dataset.json").read_text())
    for identifier in EXTRA:
        images = [str(tiny.raw / "imagesTu" / f"{identifier}_{c:04d}.nii.gz") for c in range(2)]
        write_image(tmp_path / "empty.nii.gz", np.zeros((14, 30, 30), np.uint8), SPACING)
        preprocessor = manager.preprocessor_class(verbose=False)
        label = str(tmp_path / "empty.nii.gz")
        preprocessor.run_case_save(str(tmp_path / identifier), images, label, tiny.plans, manager, dataset_json)
        expected, found = (blosc2.open(str(f / f"{identifier}.b2nd"), mode="r") for f in (tmp_path, folder))
        np.testing.assert_array_equal(found[:], expected[:])
        assert (found.dtype, found.chunks, found.blocks) == (expected.dtype, expected.chunks, expected.blocks)
        assert pickle.loads((folder / f"{identifier}.pkl").read_bytes())["class_locations"] == {}
    assert sorted(f.name for f in folder.iterdir()) == sorted(f"{i}{e}" for i in EXTRA for e in (".b2nd", ".pkl"))


def test_defaults_and_the_labeled_folder_stays_as_it_is(tiny, capsys) -> None:
    before = {f.name: f.read_bytes() for f in tiny.labeled_dir.iterdir()}
    assert main(["preprocess_unlabeled", "-d", "951", "-np", "1"]) == 0
    assert {f.name: f.read_bytes() for f in tiny.labeled_dir.iterdir()} == before
    # 3d_lowres is not in the plans.
    assert sorted(f.name for f in tiny.preprocessed.glob("*_unlabeled")) == [
        "nnUNetPlans_2d_unlabeled",
        "nnUNetPlans_3d_fullres_unlabeled",
    ]
    printed = capsys.readouterr().out
    assert "3d_fullres: 2 case(s) preprocessed, 0 unchanged" in printed


def test_second_call_does_only_what_is_missing_or_outdated(tiny) -> None:
    assert preprocess(tiny).written == {"3d_fullres": EXTRA}
    again = preprocess(tiny)
    assert (again.written, again.unchanged) == ({"3d_fullres": ()}, {"3d_fullres": EXTRA})

    (tiny.unlabeled_dir / "extra_000.pkl").unlink()
    assert preprocess(tiny).written == {"3d_fullres": ("extra_000",)}

    file = tiny.raw / "imagesTu" / "extra_001_0000.nii.gz"
    shutil.copyfile(tiny.raw / "imagesTr" / "case_001_0000.nii.gz", file)
    before = blosc2.open(str(tiny.unlabeled_dir / "extra_001.b2nd"))[:]
    assert preprocess(tiny).written == {"3d_fullres": ("extra_001",)}
    after = blosc2.open(str(tiny.unlabeled_dir / "extra_001.b2nd"))[:]
    assert not np.array_equal(before[0], after[0])

    edit_plans(tiny, lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[1.0, 2.0, 2.0]))
    assert preprocess(tiny).written == {"3d_fullres": EXTRA}
    assert preprocess(tiny, overwrite=True).written == {"3d_fullres": EXTRA}


def test_images_made_with_other_plans_are_told(tiny) -> None:
    preprocess(tiny)

    def stale() -> list[str]:
        plans = tiny.plans
        mark = plans_fingerprint(plans, plans.get_configuration("3d_fullres"))
        return made_with_other_plans(tiny.unlabeled_dir, [*EXTRA, "never_made"], mark)

    assert stale() == ["never_made"]
    edit_plans(tiny, lambda plans: plans["configurations"]["3d_fullres"].update(batch_size=7))
    assert stale() == ["never_made"], "the images do not depend on it"
    edit_plans(tiny, lambda plans: plans["configurations"]["3d_fullres"].update(spacing=[1.0, 2.0, 2.0]))
    assert stale() == [*EXTRA, "never_made"]
    preprocess(tiny)
    assert stale() == ["never_made"]


def test_cascade_shares_the_folder_of_its_base(tiny) -> None:
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "2d"}
    edit_plans(tiny, lambda plans: plans["configurations"].update({"3d_cascade_fullres": cascade}))
    report = preprocess(tiny, configurations=["3d_cascade_fullres", "3d_fullres"])
    assert report.folders == {"3d_cascade_fullres": tiny.unlabeled_dir}
    assert (tiny.unlabeled_dir / "extra_000.b2nd").is_file()


def test_all_problems_of_all_cases_are_listed_before_any_work(tiny, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(
        identifier: str, second: np.ndarray | None = None, spacing=SPACING, origin=None, channel: int = 1
    ) -> None:
        good = rng.normal(size=SHAPE).astype(np.float32)
        write_image(folder / f"{identifier}_0000.nii.gz", good, SPACING)
        if channel:
            second = good if second is None else second
            write_image(folder / f"{identifier}_{channel:04d}.nii.gz", second.astype(np.float32), spacing, origin)

    def with_value(value: float) -> np.ndarray:
        array = np.ones(SHAPE)
        array[0, 0, :3] = value
        return array

    write("good")
    write("case_000")
    write("a_nan", with_value(np.nan))
    write("b_inf", with_value(-np.inf))
    write("c_shape", np.ones((8, 10, 11)))
    write("d_spacing", spacing=(1, 1, 1.1))
    write("e_origin", origin=(0, 0, 5))
    write("f_missing", channel=0)
    write("g_gap", channel=3)
    write("h_zeros", np.zeros(SHAPE))
    write_image(folder / "h_zeros_0000.nii.gz", np.zeros(SHAPE, np.float32), SPACING)
    write("i_broken")
    (folder / "i_broken_0001.nii.gz").write_bytes(b"")
    write_image(folder / "noChannel.nii.gz", np.ones(SHAPE, np.float32), SPACING)
    (folder / "notes.txt").write_text("not an image")

    with pytest.raises(BadImagesError) as caught:
        preprocess(tiny, source_folder=folder)
    found = "\n".join(caught.value.problems)
    for expected in (
        "noChannel.nii.gz: is not called {CASE}_{XXXX}.nii.gz",
        "case_000: is already the id of a training case",
        "a_nan_0001.nii.gz: holds 3 NaN",
        "b_inf_0001.nii.gz: holds 3 Inf",
        "c_shape: c_shape_0001.nii.gz and c_shape_0000.nii.gz differ in shape ([8, 10, 11] and [8, 10, 12])",
        "d_spacing: d_spacing_0001.nii.gz and d_spacing_0000.nii.gz differ in spacing",
        "e_origin: e_origin_0001.nii.gz and e_origin_0000.nii.gz differ in origin",
        "f_missing: has 1 channel(s) (f_missing_0000.nii.gz), but the dataset has 2 (MR0, MR1)",
        "g_gap: missing g_gap_0001.nii.gz, g_gap_0002.nii.gz",
        "h_zeros: holds nothing but zeros",
        "i_broken_0001.nii.gz: cannot be read",
    ):
        assert expected in found
    assert len(caught.value.problems) == 11
    assert str(folder) in str(caught.value) and "11 problems" in str(caught.value)
    assert not tiny.unlabeled_dir.exists()
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"plans_name": "nnUNetResEncUNetMPlans"},
            FileNotFoundError,
            r"nnUNetv2_plan_and_preprocess -d 951.*nnUNetPlans",
        ),
        ({"configurations": ["3d_lowres"]}, ValueError, r"no configuration 3d_lowres; they have 2d, 3d_fullres"),
        ({"source_folder": "nowhere"}, FileNotFoundError, r"nowhere does not exist.*-i"),
        ({"num_processes": 0}, ValueError, r"at least 1, not 0"),
    ],
)
def test_wrong_arguments(tiny, kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        preprocess(tiny, **kwargs)


def test_no_images_no_dataset_no_variable(tiny, tmp_path, monkeypatch) -> None:
    (tmp_path / "a_0000.png").touch()
    with pytest.raises(FileNotFoundError, match=r"no file that ends in \.nii\.gz"):
        preprocess(tiny, source_folder=tmp_path)
    with pytest.raises(ValueError, match="ID 777"):
        preprocess_unlabeled(777)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="nnUNet_raw is not set"):
        preprocess(tiny)


def test_errors_of_the_command(tiny, capsys) -> None:
    assert main(["preprocess_unlabeled", "-d", "951", "-c", "3d_lowres", "-np", "1"]) == 1
    assert "no configuration 3d_lowres" in capsys.readouterr().err
    assert main(["preprocess_unlabeled", "-d", "951", "-i", str(tiny.raw / "imagesTr"), "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("is already the id of a training case") == 7


def test_a_case_that_fails_leaves_no_trace_and_does_not_stop_the_others(tiny) -> None:
    # A folder where the image should go: the renaming fails.
    (tiny.unlabeled_dir / "extra_000.b2nd" / "x").mkdir(parents=True)
    with pytest.raises(
        PreprocessingError, match=r"1 of 2 cases failed for 3d_fullres[^$]*extra_000: IsADirectoryError"
    ):
        preprocess(tiny)
    names = sorted(f.name for f in tiny.unlabeled_dir.iterdir())
    assert names == ["extra_000.b2nd", "extra_001.b2nd", "extra_001.pkl"]


def test_a_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(PreprocessingError, match="lack of memory.*-np"):
        list(run_all(os._exit, [(1,), (1,)], 2, "", False))


@pytest.mark.slow
def test_worker_processes_give_the_same_result(tiny, tmp_path) -> None:
    preprocess(tiny)
    expected = {i: blosc2.open(str(tiny.unlabeled_dir / f"{i}.b2nd"))[:] for i in EXTRA}
    shutil.rmtree(tiny.unlabeled_dir)
    preprocess(tiny, num_processes=2)
    for identifier, array in expected.items():
        np.testing.assert_array_equal(blosc2.open(str(tiny.unlabeled_dir / f"{identifier}.b2nd"))[:], array)


def test_images_from_elsewhere_are_added(tiny, tmp_path) -> None:
    preprocess(tiny)
    for file in Path(tiny.raw / "imagesTu").glob("extra_000_*"):
        shutil.copyfile(file, tmp_path / file.name.replace("extra_000", "more.1"))
    assert preprocess(tiny, source_folder=tmp_path).written == {"3d_fullres": ("more.1",)}
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(tiny.unlabeled_dir))) == [*EXTRA, "more.1"]
