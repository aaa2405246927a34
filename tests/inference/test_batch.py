"""Folders of images: files, continuing, parts, worker processes and flags."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from models import make_model
from nnunetv2.inference import predict_from_raw_data
from predict_command import HERE, command

from nnunet_diffext.cli.main import build_parser, main
from nnunet_diffext.inference.batch import find_cases, predict_folder
from nnunet_diffext.inference.export import Output
from nnunet_diffext.inference.grid import ModelPlans
from nnunet_diffext.inference.predictor import Predictor

MAPS = ("entropy", "mutual_information", "variance")


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_every_file_of_a_case(sampling: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    drawn = ("-samples", "3", "-steps", "2", "-sampler", "ddim")
    assert command(sampling, two, out, "--save_probabilities", "--uncertainty", "--save_samples", *drawn) == 0
    assert "mean of 3 member(s)" in capsys.readouterr().out
    expected = {"dataset.json", "plans.json", "predict_from_raw_data_args.json", "quality.csv", "quality.json"}
    for case in ("case_000", "case_001"):
        expected |= {f"{case}.nii.gz", f"{case}.npz", f"{case}.pkl"}
        expected |= {f"uncertainty/{case}_{name}.nii.gz" for name in MAPS}
        expected |= {f"samples/{case}_sample{m:02d}.nii.gz" for m in range(3)}
    found = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} - {".quality.lock"}
    assert found == expected
    result = Predictor(sampling, (0,), mirroring=False, samples=3, steps=2).predict_case(
        [str(two / "case_001_0000.nii.gz")], variance=True, samples=True
    )
    image = sitk.ReadImage(str(two / "case_001_0000.nii.gz"))
    for name in MAPS:
        written = sitk.ReadImage(str(out / "uncertainty" / f"case_001_{name}.nii.gz"))
        assert written.GetPixelID() == sitk.sitkFloat32 and written.GetDirection() == image.GetDirection()
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written), result[name])
    assert np.array_equal(read(out / "case_001.nii.gz"), result["segmentation"])
    assert np.array_equal(read(out / "samples" / "case_001_sample02.nii.gz"), result["samples"][2])
    with np.load(out / "case_001.npz") as stored:
        np.testing.assert_array_equal(stored["probabilities"], result["probabilities"])
    assert "sitk_stuff" in pickle.loads((out / "case_001.pkl").read_bytes())
    row = json.loads((out / "quality.json").read_text())["cases"]["case_001"]
    assert row["quality"] == pytest.approx(result["quality"]["quality"]) and row["agreement"] is not None
    record = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert record["settings"]["samples"] == 3 and record["save_samples"] is True


def test_continue_predicts_what_is_incomplete(stock: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predictor = Predictor(stock, (0,), mirroring=False)
    options = {"preprocessing_processes": 0, "export_processes": 0, "show_progress": False}
    output = Output(out, probabilities=True)
    assert predict_folder(predictor, two, output, **options).done == ["case_000", "case_001"]
    first = (out / "case_000.nii.gz").stat().st_mtime_ns
    rows = json.loads((out / "quality.json").read_text())["cases"]
    (out / "case_001.npz").unlink()
    again = predict_folder(predictor, two, output, continue_prediction=True, **options)
    assert (again.skipped, again.done, again.failed) == (["case_000"], ["case_001"], {})
    assert (out / "case_000.nii.gz").stat().st_mtime_ns == first
    assert json.loads((out / "quality.json").read_text())["cases"] == rows
    # a segmentation without its row, as a kill between the two leaves it, is not complete
    (out / "quality.json").write_text(json.dumps({"cases": {"case_001": rows["case_001"]}}))
    again = predict_folder(predictor, two, output, continue_prediction=True, **options)
    assert (again.skipped, again.done) == (["case_001"], ["case_000"])
    # more outputs are asked for than there are
    again = predict_folder(predictor, two, Output(out, uncertainty=True), continue_prediction=True, **options)
    assert again.done == ["case_000", "case_001"]


def test_no_file_of_an_earlier_prediction_stays(sampling: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copy(two / "case_000_0000.nii.gz", two / "case_000_sample00_0000.nii.gz")  # a name that looks like a sample
    full = ("--save_probabilities", "--uncertainty", "--save_samples", "-samples", "3", "-steps", "2")
    assert command(sampling, two, out, *full) == 0
    (two / "case_001_0000.nii.gz").unlink()  # not predicted again: it keeps all of its files
    before = {f for f in out.rglob("case_*") if f.is_file()}
    assert command(sampling, two, out, "--save_samples", "-samples", "2", "-steps", "2") == 0
    kept = {f for f in before if f.name.startswith("case_001")}
    for case in ("case_000", "case_000_sample00"):
        kept |= {out / f"{case}.nii.gz", *(out / "samples" / f"{case}_sample0{m}.nii.gz" for m in (0, 1))}
    assert {f for f in out.rglob("case_*") if f.is_file()} == kept


def test_a_sampler_that_begins_anew_in_every_tile_is_said(sampling: Path, two: Path, tmp_path: Path, capsys) -> None:
    said = "noise on the way, which begins anew in every tile"
    for number, (more, expected) in enumerate([
        (("-samples", "1", "-sampler", "ddpm"), 1), (("-samples", "1", "-sampler", "ddim"), 0),
        (("-samples", "1", "-sampler", "ddpm", "-steps", "1"), 0), (("-samples", "0",), 0),
    ]):  # fmt: skip
        assert command(sampling, two, tmp_path / str(number), *more) == 0
        assert capsys.readouterr().out.count(said) == expected, more
    plans = json.loads((sampling / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [24, 24, 24]
    (sampling / "plans.json").write_text(json.dumps(plans))
    for more, expected in (((), 0), (("--save_samples",), 1)):  # a single tile
        assert command(sampling, two, tmp_path / "single", "-samples", "1", "-sampler", "ddpm", *more) == 0
        assert capsys.readouterr().out.count(said) == expected


def test_continuing_with_other_settings_is_said(stock: Path, two: Path, tmp_path: Path, capsys) -> None:
    assert command(stock, two, tmp_path / "out") == 0
    assert command(stock, two, tmp_path / "out", "--continue_prediction", "-step_size", "1") == 0
    printed = capsys.readouterr().out
    assert "other settings: step_size 0.5 (now 1.0)" in printed and "2 skipped" in printed


def test_a_kill_while_writing_leaves_nothing_that_is_trusted(
    stock: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    model = ModelPlans.of(Predictor(stock, (0,)).nnunet)
    output = Output(out, probabilities=True)
    writer = model.plans.image_reader_writer_class

    def killed(*args):
        raise KeyboardInterrupt

    predictor = Predictor(stock, (0,), mirroring=False)
    options = {"preprocessing_processes": 0, "export_processes": 0, "show_progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_seg", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(predictor, two, output, **options)
    assert not list(out.glob("case_*")) and not output.is_complete(model, "case_000")
    output.staging("case_000").mkdir()  # what kill -9 leaves
    (output.staging("case_000") / "case_000.npz").write_bytes(b"half")
    report = predict_folder(predictor, two, output, continue_prediction=True, **options)
    assert report.done == ["case_000", "case_001"] and not list(out.glob(".incomplete*"))


def test_parts_share_the_cases_and_the_table(stock: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part in (0, 1, 2):
        assert command(stock, images, out, "-num_parts", "3", "-part_id", str(part), "-step_size", "1") == 0
        assert len(list(out.glob("case_*.nii.gz"))) == (2, 4, 5)[part]
    assert len(json.loads((out / "quality.json").read_text())["cases"]) == 5


@pytest.mark.slow
def test_worker_processes_give_the_same_files(stock: Path, two: Path, tmp_path: Path) -> None:
    (two / "broken_0000.nii.gz").write_bytes(b"this is no image")
    predictor = Predictor(stock, (0,), mirroring=False)
    for name, processes in (("here", 0), ("there", 1)):
        report = predict_folder(
            predictor, two, Output(tmp_path / name, uncertainty=True), preprocessing_processes=processes,
            export_processes=processes, show_progress=False,
        )  # fmt: skip
        assert report.done == ["case_000", "case_001"] and "cannot be read" in report.failed["broken"]
    for file in (tmp_path / "here").rglob("*.nii.gz"):
        assert np.array_equal(read(file), read(tmp_path / "there" / file.relative_to(tmp_path / "here")))
    assert (tmp_path / "here" / "quality.csv").read_text() == (tmp_path / "there" / "quality.csv").read_text()


def test_flags_are_those_of_nnunet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(text: str) -> set[str]:
        return set(re.findall(r"^\s+(--?\w+)", text, flags=re.MULTILINE)) - {"-h"}

    theirs: set[str] = set()
    for entry in (predict_from_raw_data.predict_entry_point, predict_from_raw_data.predict_entry_point_modelfolder):
        monkeypatch.setattr("sys.argv", ["predict", "-h"])
        with pytest.raises(SystemExit):
            entry()
        theirs |= flags(capsys.readouterr().out)
    ours = build_parser("predict").parse_args
    with pytest.raises(SystemExit):
        ours(["predict", "-h"])
    assert len(theirs) > 18 and theirs <= flags(capsys.readouterr().out)
    args = ours(["predict", "-i", "a", "-o", "b"])
    assert (args.p, args.tr, args.f, args.step_size) == ("nnUNetPlans", "nnUNetTrainer", (0, 1, 2, 3, 4), 0.5)
    assert (args.chk, args.npp, args.nps, args.device) == ("checkpoint_final.pth", 3, 3, "cuda")


def test_models_are_found_by_name(stock: Path, two: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(stock.parents[1]))
    call = ["predict", "-i", str(two), "-o", str(tmp_path / "out"), "-d", "871", *HERE]
    assert main([*call, "-c", "3d_fullres"]) == 0 and (tmp_path / "out" / "case_000.nii.gz").is_file()
    assert main([*call, "-c", "2d"]) == 1
    assert "Models in" in capsys.readouterr().err
    assert main(call) == 1
    assert "-c 3d_fullres" in capsys.readouterr().err


def test_2d_natural_images_get_npy_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from skimage import io

    model = make_model(tmp_path / "results", patch=(16, 16), reader="NaturalImage2DIO", ending=".png")
    (tmp_path / "in").mkdir()
    picture = (np.random.default_rng(0).random((20, 24)) * 255).astype(np.uint8)
    io.imsave(tmp_path / "in" / "photo_0000.png", picture, check_contrast=False)
    out = tmp_path / "out"
    assert command(model, tmp_path / "in", out, "--uncertainty") == 0
    assert ".png cannot hold floats" in capsys.readouterr().out
    assert io.imread(out / "photo.png").shape == (20, 24)
    assert np.load(out / "uncertainty" / "photo_entropy.npy").shape == (20, 24)
    row = json.loads((out / "quality.json").read_text())["cases"]["photo"]
    assert row["labels"]["ball"]["volume_ml"] is None, "an image without depth has no volume"


def test_cases_are_divided_and_named_like_nnunet(stock: Path, images: Path) -> None:
    model = Predictor(stock, (0,)).model
    cases, wrong = find_cases(model, images, 1, 2)
    assert [c.identifier for c in cases] == ["case_001", "case_003"] and wrong == {}
