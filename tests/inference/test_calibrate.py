"""From validation cases to a stored temperature, and back into predictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from models import DATASET, REGIONS, THREE, make_model, preprocess_like_nnunet

from nnunet_diffext.cli.main import main
from nnunet_diffext.evaluation.calibration import calibration
from nnunet_diffext.inference.calibrate import calibrate
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.stored import StoredCase, bytes_per_voxel
from nnunet_diffext.inference.temperature import apply_temperature

IDS = [f"case_{i:03d}" for i in range(5)]
FOLDS = [{"train": IDS[2:], "val": IDS[:2]}, {"train": IDS[:2], "val": IDS[2:]}]
HERE = ("-device", "cpu", "--disable_tta", "--disable_progress_bar", "-step_size", "1")


@pytest.fixture
def model(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folds of an over-confident network, and the data they were validated on."""
    folder = make_model(tmp_path / "results", labels=THREE, folds=(0, 1, "all"), patch=(24, 24, 24))
    preprocess_like_nnunet(folder, raw, tmp_path / "preprocessed", FOLDS)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return folder


def command(model: Path, *more: str) -> int:
    return main(["calibrate", "-m", str(model), *HERE, *more])


def measured(model: Path, raw: Path, temperature: float):
    """Calibration of what predict_case gives on the validation cases, each by its fold: nothing of calibrate.py."""
    total = None
    for fold, entry in enumerate(FOLDS):
        predictor = Predictor(model, (fold,), mirroring=False, step_size=1.0, temperature=temperature)
        for case in entry["val"]:
            p = predictor.predict_case([raw / "imagesTr" / f"{case}_0000.nii.gz"])["probabilities"]
            reader = predictor.model.plans.image_reader_writer_class()
            truth = reader.read_seg(str(raw / "labelsTr" / f"{case}.nii.gz"))[0][0].astype(int)
            part = calibration(p, truth)
            total = part if total is None else total + part
    return total


def test_the_stored_temperature_is_the_best_one_for_predict(model: Path, raw: Path, capsys) -> None:
    assert command(model, "-f", "0", "1") == 0
    content = json.loads((model / "calibration.json").read_text())
    temperature = content["temperature"]
    assert temperature > 1.2 and content["cases"] == [*IDS] and content["settings"]["folds"] == [0, 1]
    for key, t in (("before", 1.0), ("after", temperature)):
        oracle = measured(model, raw, t)
        for name in ("nll", "ece", "brier"):
            assert content[key][name] == pytest.approx(getattr(oracle, name), rel=1e-3, abs=1e-5), (key, name)
    assert content["after"]["nll"] < content["before"]["nll"] * 0.95
    for factor in (0.95, 1.05):
        assert measured(model, raw, temperature * factor).nll > content["after"]["nll"]
    halves = content["cross_validated"]
    assert content["after"]["nll"] <= halves["nll"] <= content["before"]["nll"]
    printed = capsys.readouterr().out
    assert "fitted on 5 case(s) of fold 0 1" in printed and "on the other half" in printed and "Wrote" in printed
    assert content["versions"]["nnunetv2"] and content["date"].endswith("UTC")


def test_predict_uses_it_and_says_so(model: Path, raw: Path, tmp_path: Path, capsys) -> None:
    images = tmp_path / "in"
    images.mkdir()
    shutil.copy(raw / "imagesTr" / "case_000_0000.nii.gz", images)
    assert command(model, "-f", "0") == 0
    temperature = json.loads((model / "calibration.json").read_text())["temperature"]
    capsys.readouterr()
    call = ["predict", "-m", str(model), "-i", str(images), "-npp", "0", "-nps", "0", "--save_probabilities", *HERE]
    outputs = {}
    for name, more in {"with": (), "without": ("--no_temperature",), "other": ("-f", "1")}.items():
        assert main([*call, "-o", str(tmp_path / name), *(more if "-f" in more else ("-f", "0", *more))]) == 0
        outputs[name] = capsys.readouterr().out
    assert f"Temperature {temperature:.4g}" in outputs["with"] and "WARNING" not in outputs["with"]
    assert "Temperature" not in outputs["without"]
    assert "folds 0 (now 1)" in outputs["other"]
    retrained = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(retrained, weights_only=False)
    torch.save({**content, "current_epoch": 7}, retrained)
    assert main([*call, "-o", str(tmp_path / "again"), "-f", "0"]) == 0
    assert "fold 0 was trained again since the temperature was fitted" in capsys.readouterr().out
    p, q = (np.load(tmp_path / name / "case_000.npz")["probabilities"] for name in ("with", "without"))
    np.testing.assert_allclose(p, apply_temperature(q, temperature, False), atol=1e-6)
    assert not np.allclose(p, q, atol=1e-2)
    files = [(tmp_path / name / "case_000.nii.gz").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1], "the segmentation must not change"
    rows = [json.loads((tmp_path / n / "quality.json").read_text())["cases"]["case_000"] for n in ("with", "without")]
    assert rows[0]["quality"] < rows[1]["quality"], "a more modest model expects less of itself"


def relabelled(raw: Path, own: Path, change: Callable[[np.ndarray], None]) -> Path:
    """A copy of the raw dataset with other labels."""
    shutil.copytree(raw, own)
    for file in (own / "labelsTr").iterdir():
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        change(array)
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    return own


@pytest.mark.parametrize("labels", [THREE, REGIONS])
def test_labels_that_nobody_looked_for(
    labels: dict[str, Any], raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MR. A core that is predicted there is neither right nor wrong."""
    folder = make_model(tmp_path / "results", labels=labels, patch=(24, 24, 24))
    modalities = {case: "MR" if case == IDS[0] else "CT" for case in IDS}
    known = {"modalities": modalities, "annotated": {"MR": [next(name for name in labels if name != "background")]}}
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "diffext": known}))

    def hide(array: np.ndarray) -> None:
        array[array == 2] = 1 if labels is REGIONS else 0

    own = relabelled(raw, tmp_path / "raw", hide)
    preprocess_like_nnunet(folder, own, tmp_path / "preprocessed", [{"train": IDS[1:], "val": IDS[:1]}])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))

    def make_predictor(fold: int) -> Predictor:
        return Predictor(folder, (fold,), mirroring=False, temperature=1.0)

    found = calibrate(make_predictor, (0,), show_progress=False)
    p = make_predictor(0).predict_case([own / "imagesTr" / f"{IDS[0]}_0000.nii.gz"])["probabilities"]
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(own / "labelsTr" / f"{IDS[0]}.nii.gz"))).astype(int)
    for key, temperature in (("before", 1.0), ("after", found["temperature"])):
        q = apply_temperature(p, temperature, labels is REGIONS)
        if labels is REGIONS:
            oracle = calibration(q[:1], truth[None] > 0, regions=True)
        else:
            oracle = calibration(np.stack([q[0] + q[2], q[1]]), truth)
        assert found[key]["nll"] == pytest.approx(oracle.nll, rel=1e-3), key
        assert found[key]["brier"] == pytest.approx(oracle.brier, rel=1e-3), key
    assert found["after"]["nll"] < found["before"]["nll"]


def test_regions_and_ignored_voxels(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "results", labels={**REGIONS, "ignore": 3}, patch=(24, 24, 24))

    def ignore(array: np.ndarray) -> None:
        array[:6] = 3

    own = relabelled(raw, tmp_path / "raw", ignore)
    preprocess_like_nnunet(folder, own, tmp_path / "preprocessed", [{"train": IDS[2:], "val": IDS[:2]}])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))

    def make_predictor(fold: int) -> Predictor:
        return Predictor(folder, (fold,), mirroring=False, temperature=1.0)

    content = calibrate(make_predictor, (0,), show_progress=False)
    assert content["after"]["nll"] < content["before"]["nll"] and content["cross_validated"] is None
    total = None
    for case in IDS[:2]:
        p = make_predictor(0).predict_case([own / "imagesTr" / f"{case}_0000.nii.gz"])["probabilities"]
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(own / "labelsTr" / f"{case}.nii.gz")))
        reference = np.stack([np.isin(truth, (1, 2)), truth == 2])
        part = calibration(p, reference, regions=True, mask=truth != 3)
        total = part if total is None else total + part
    for name in ("nll", "ece", "brier"):
        assert content["before"][name] == pytest.approx(getattr(total, name), rel=1e-4)


def test_a_cascade_gets_the_previous_stage_of_the_training(raw: Path, tmp_path: Path, monkeypatch) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = make_model(tmp_path / "results", labels=THREE, patch=(24, 24, 24), configuration="3d_cascade_fullres")
    preprocess_like_nnunet(folder, raw, tmp_path / "preprocessed", [{"train": IDS[1:], "val": IDS[:1]}])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    predictor = Predictor(folder, (0,), mirroring=False, temperature=1.0)
    with pytest.raises(FileNotFoundError, match="validation of 3d_lowres"):
        calibrate(lambda fold: predictor, (0,), show_progress=False)
    earlier = folder.parent / "nnUNetTrainer__nnUNetPlans__3d_lowres" / "predicted_next_stage" / "3d_cascade_fullres"
    earlier.mkdir(parents=True)
    label = raw / "labelsTr" / "case_000.nii.gz"
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
    nnUNetDatasetBlosc2.save_seg(truth.astype(np.uint8), str(earlier / "case_000"), truth.shape, truth.shape)
    content = calibrate(lambda fold: predictor, (0,), show_progress=False)
    p = predictor.predict_case([raw / "imagesTr" / "case_000_0000.nii.gz"], label)["probabilities"]
    assert content["before"]["nll"] == pytest.approx(calibration(p, truth.astype(int)).nll, rel=1e-4)


def test_a_cascade_may_be_renamed(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "results", labels=THREE, patch=(24, 24, 24), configuration="3d_cascade_fullres")
    preprocess_like_nnunet(folder, raw, tmp_path / "preprocessed", [{"train": IDS[1:], "val": IDS[:1]}])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    predictor = Predictor(folder.rename(folder.parent / "best model"), (0,), mirroring=False, temperature=1.0)
    missing = "nnUNetTrainer__nnUNetPlans__3d_lowres/predicted_next_stage/3d_cascade_fullres does not exist"
    with pytest.raises(FileNotFoundError, match=missing):
        calibrate(lambda fold: predictor, (0,), show_progress=False)


def test_what_cannot_be_stored_is_said_before_any_work(model: Path, monkeypatch, capsys) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("a case was predicted")

    monkeypatch.setattr(Predictor, "predict_preprocessed", worked)
    (model / "calibration.json").mkdir()
    assert command(model, "-f", "0") == 1
    assert "Cannot write" in (error := capsys.readouterr().err) and "--dry_run" in error
    assert command(model, "--remove") == 0, "a folder is no calibration"
    (model / "calibration.json").rmdir()
    usage = shutil.disk_usage("/")._replace(free=10**5)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert command(model, "-f", "0", "1") == 1
    assert "TMPDIR" in (error := capsys.readouterr().err) and "0.0 GB are free" in error


@pytest.mark.parametrize("during", ["numpy.save", "nnunet_diffext.inference.calibration_file.write_atomically"])
def test_a_disk_that_fills_up_is_no_traceback(during: str, model: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(during, full)
    assert command(model, "-f", "0") == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err
    assert ("TMPDIR" in printed.err) == (during == "numpy.save")
    assert ("Temperature" in printed.out) == (during != "numpy.save"), "the figures are not lost"


@pytest.mark.parametrize("regions", [False, True])
def test_stored_probabilities_are_halved_and_keep_what_calibration_needs(regions: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits = 12 * rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    p = 1 / (1 + np.exp(-logits)) if regions else np.exp(logits) / np.exp(logits).sum(0)
    p[:, 0, 0, 0] = (1, 0, 0)
    truth = (p > 0.5) if regions else p.argmax(0)
    mask = rng.random(p.shape[1:]) < 0.9
    stored = StoredCase(tmp_path, "case", p, truth, mask)
    found, reference, valid = stored.load()
    assert np.array_equal(reference, truth) and np.array_equal(valid, mask)
    np.testing.assert_allclose(found, p, rtol=0.01, atol=1e-11)
    np.testing.assert_allclose(1 - found, 1 - p, rtol=0.01, atol=1e-6)
    space = sum(f.stat().st_size for f in tmp_path.iterdir()) - 3 * 128
    assert space == bytes_per_voxel(3, regions) * mask.size < (4 * 3 + 8 + 1) * mask.size / 2


def test_dry_run_and_remove(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(model, "-f", "0", "--dry_run") == 0
    assert "nothing was stored" in capsys.readouterr().out and not (model / "calibration.json").exists()
    (model / "calibration.json").write_text('{"temperature": 1.5}')
    assert command(model, "--remove") == 0 and not (model / "calibration.json").exists()
    assert command(model, "--remove") == 0 and "There is no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folds", "splits", "message"),
    [
        (["all"], FOLDS, "trained on every case"),
        (["1"], FOLDS[:1], "there is no fold 1"),
        (["0"], [{"train": IDS, "val": IDS[:2]}], "trained on its own validation cases"),
        (["0"], [{"train": IDS, "val": []}], "no validation cases"),
        (["0", "1"], [FOLDS[0], {"train": IDS[1:], "val": IDS[:1]}], "validation case of several folds"),
        (["0", "4"], FOLDS, "No checkpoint_final.pth for fold 4"),
    ],
)
def test_refusals(folds: list[str], splits: list, message: str, model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))
    assert command(model, "-f", *folds) == 1
    assert message in capsys.readouterr().err and not (model / "calibration.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"temperature": -1}', '{"temperature": "hot"}', "{}"])
def test_a_damaged_file_is_never_guessed_at(content: str, stock: Path, tmp_path: Path) -> None:
    shutil.copytree(stock, tmp_path / "model")
    (tmp_path / "model" / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match="calibration.json"):
        Predictor(tmp_path / "model", (0,))
    assert Predictor(tmp_path / "model", (0,), temperature=1.0).temperature == 1
