"""Bad files in a folder of images, and what the command refuses before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from predict_command import command


def test_bad_files_cost_the_others_nothing(stock: Path, two: Path, tmp_path: Path, capsys) -> None:
    good = sitk.ReadImage(str(two / "case_000_0000.nii.gz"))
    (two / "broken_0000.nii.gz").write_bytes(b"this is no image")
    shutil.copy(two / "case_000_0000.nii.gz", two / "many_0000.nii.gz")
    shutil.copy(two / "case_000_0000.nii.gz", two / "many_0001.nii.gz")
    shutil.copy(two / "case_000_0000.nii.gz", two / "gap_0001.nii.gz")
    shutil.copy(two / "case_000_0000.nii.gz", two / "nonumber.nii.gz")
    array = sitk.GetArrayFromImage(good).copy()
    array[3, 4, 5] = np.nan
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(good)
    sitk.WriteImage(image, str(two / "nan_0000.nii.gz"))
    out = tmp_path / "out"
    assert command(stock, two, out) == 1
    assert sorted(f.name for f in out.glob("*.nii.gz")) == ["case_000.nii.gz", "case_001.nii.gz"]
    printed = capsys.readouterr().out
    assert "2 case(s) predicted" in printed and "5 case(s) FAILED" in printed
    for line in ("broken: .*cannot be read", "many: has 2 chan", "gap: missing gap_0000", "nan: .*1 NaN", "nonumber"):
        assert re.search(f"- {line}", printed), line
    assert set(json.loads((out / "quality.json").read_text())["cases"]) == {"case_000", "case_001"}
    # an older result of a case that fails now is kept, with its scores
    (two / "case_001_0000.nii.gz").write_bytes(b"damaged since")
    before = (out / "case_001.nii.gz").read_bytes()
    assert command(stock, two, out) == 1
    assert (out / "case_001.nii.gz").read_bytes() == before
    assert set(json.loads((out / "quality.json").read_text())["cases"]) == {"case_000", "case_001"}
    (out / "case_001.nii.gz").unlink()
    assert command(stock, two, out) == 1
    assert set(json.loads((out / "quality.json").read_text())["cases"]) == {"case_000"}


def test_images_that_nnunet_only_warns_about_are_predicted(stock: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "zeros"
    folder.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((18, 18, 18), np.float32)), str(folder / "zero_0000.nii.gz"))
    assert command(stock, folder, tmp_path / "out") == 0
    assert "nothing but zeros" in capsys.readouterr().out and (tmp_path / "out" / "zero.nii.gz").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-f", "0", "3"], r"for fold 3 in .*use -f 0 1"),
        (["-f", "zero"], "neither a number nor 'all'"),
        (["-chk", "checkpoint_best.pth"], r"checkpoint_final.pth \(choose with -chk\)"),
        (["-m", "{tmp}/nowhere"], "does not exist"),
        (["-d", "871"], "not with both"),
        (["-i", "{tmp}/nowhere"], "input folder .* does not exist"),
        (["-i", "{tmp}"], "no file that ends in .nii.gz"),
        (["-o", "{tmp}/file/out"], "Cannot write to the output folder"),
        (["-device", "cuda"], "finds no GPU here"),
        (["-device", "tpu"], "must be cpu, cuda or mps"),
        (["-step_size", "0"], "-step_size must be above 0"),
        (["-part_id", "1"], "-part_id must be 0 to 0"),
        (["-samples", "3"], "does not sample"),
        (["--save_samples"], "draws no samples"),
        (["-npp", "-1"], "0 or more"),
    ],
)
def test_refused_before_any_work(
    change: list[str], message: str, stock: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if change == ["-device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").write_text("")
    assert command(stock, images, tmp_path / "out", *(c.format(tmp=tmp_path) for c in change)) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(stock: Path, images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "closed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert command(stock, images, tmp_path / "closed") == 1
    assert "Cannot write" in capsys.readouterr().err
