"""Evaluation of folders with damaged, missing or odd files: what is reported, what is kept, what is refused."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from prediction_folders import (
    LABELS,
    evaluate,
    make_folders,
    probabilities_of,
    read_summary,
    reference_of,
    write_labels,
)

from nnunet_diffext.cli.main import main
from nnunet_diffext.evaluation.calibration import label_calibration
from nnunet_diffext.evaluation.cases import score_case
from nnunet_diffext.evaluation.report import write_result
from nnunet_diffext.evaluation.task import OUTPUTS, Options, find_cases, find_dataset_json, load_task


def test_one_bad_case_of_each_kind_does_not_stop_the_others(tmp_path, capsys):
    pred, gt = make_folders(tmp_path, cases=6)
    untouched = pred / "summary.json"
    untouched.write_text("nnU-Net's own")
    (pred / "case_1.nii.gz").write_bytes((pred / "case_1.nii.gz").read_bytes()[:50])
    write_labels(pred / "case_2.nii.gz", reference_of(2), spacing=(3.0, 1.0, 1.0))
    (pred / "case_3.nii.gz").unlink()
    (gt / "case_4.nii.gz").unlink()
    (pred / "case_5.npz").write_bytes(b"PK no archive")
    arguments = ["evaluate", "-pred", str(pred), "-gt", str(gt), "-np", "1", "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    problems = [line for line in printed.err.splitlines() if line.startswith("not evaluated: ")]
    for case, reason in (
        ("case_1", "cannot be read"),
        ("case_2", "same geometry"),
        ("case_3", "1 reference(s) without prediction"),
        ("case_4", "no reference"),
        ("case_5", "probabilities not"),
    ):
        assert any(case in line and reason in line for line in problems), (case, problems)
    assert len(problems) == 5 and "organ" in printed.out
    summary = read_summary(tmp_path / "out")
    assert [row["case"] for row in summary["metric_per_case"]] == ["case_0", "case_5"]
    assert sorted(summary["failed"]) == ["case_1", "case_2", "case_4", "case_5"] and summary["missing"] == ["case_3"]
    assert summary["calibration"]["cases"] == 1
    assert summary["calibration"]["cases_without_probabilities"] == ["case_5"]
    assert "lack probabilities: case_5" in printed.err
    assert untouched.read_text() == "nnU-Net's own"
    assert main([*arguments, "--chill"]) == 0
    # Both cases without any good file: an older result stays, also with --chill.
    before = (tmp_path / "out" / OUTPUTS[0]).read_bytes()
    for case in ("case_0", "case_5"):
        (pred / f"{case}.nii.gz").write_bytes(b"")
    assert main([*arguments, "--chill"]) == 1
    assert "none of the 5 case(s)" in capsys.readouterr().err
    assert (tmp_path / "out" / OUTPUTS[0]).read_bytes() == before
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("array", "reason"),
    [(lambda p: p[:2], "labels and reference need"), (lambda p: 9 * p, "logits"), (lambda p: None, "'probabilities'")],
)
def test_unusable_probabilities_keep_the_segmentation_metrics(tmp_path, array, reason):
    pred, gt = make_folders(tmp_path, cases=1)
    changed = array(np.load(pred / "case_0.npz")["probabilities"])
    np.savez(pred / "case_0.npz", **({"other": np.zeros(1)} if changed is None else {"probabilities": changed}))
    result = evaluate(pred, gt)
    assert reason in result.failed["case_0"]
    assert result.report["metric_per_case"][0]["metrics"]["1"]["Dice"] > 0.5 and "calibration" not in result.report


def test_2d_images_next_to_the_pictures_that_are_written(tmp_path):
    import skimage.io

    pred, gt = tmp_path / "pred", tmp_path / "gt"
    pred.mkdir()
    gt.mkdir()
    (pred / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}, "file_ending": ".png"}))
    reference = np.zeros((24, 30), np.uint8)
    reference[4:15, 6:20] = 1
    p = probabilities_of(reference[None], np.random.default_rng(0), classes=2)
    for folder, labels in ((pred, np.roll(reference, 3, axis=0)), (gt, reference)):
        skimage.io.imsave(folder / "a.png", labels, check_contrast=False)
    np.savez(pred / "a.npz", probabilities=p)
    for _ in range(2):  # the second time beside reliability.png, which is no prediction
        result = evaluate(pred, gt)
        assert result.failed == {} and [r["case"] for r in result.report["metric_per_case"]] == ["a"]
    values = result.report["metric_per_case"][0]["metrics"]["1"]
    assert values["HD95"] == 3 and math.isnan(values["volume_ref_ml"]) and values["volume_error"] == 0
    assert values["nll"] == pytest.approx(label_calibration(p[1], reference[None] == 1).nll)


def test_notes_are_no_failure(tmp_path, capsys):
    import SimpleITK as sitk

    pred, gt = make_folders(tmp_path, cases=1, npz=False)
    labels = sitk.ReadImage(str(gt / "case_0.nii.gz"))
    labels.SetOrigin((5.0, 0.0, 0.0))
    labels[0, 0, 0] = 7
    sitk.WriteImage(labels, str(gt / "case_0.nii.gz"))
    assert main(["evaluate", "-pred", str(pred), "-gt", str(gt), "-np", "1"]) == 0
    printed = capsys.readouterr().err
    assert "the origin of prediction" in printed and "[7]" in printed


def test_dataset_json_is_found_where_nnunet_leaves_it(tmp_path):
    pred, gt = make_folders(tmp_path, cases=1, npz=False)
    assert find_dataset_json(pred) == pred / "dataset.json"
    model = tmp_path / "nnUNetTrainer__nnUNetPlans__2d"
    validation = model / "fold_0" / "validation"
    validation.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="-djfile"):
        find_dataset_json(validation)
    (pred / "dataset.json").rename(model / "dataset.json")
    assert find_dataset_json(validation) == model / "dataset.json"
    with pytest.raises(FileNotFoundError, match="-djfile"):
        evaluate(pred, gt)
    assert evaluate(pred, gt, dataset_json=model / "dataset.json").failed == {}


def test_plans_name_the_reader(tmp_path):
    pred, gt = make_folders(tmp_path, cases=1)
    plans = {"image_reader_writer": "NibabelIO", "label_manager": "LabelManager"}
    (pred / "plans.json").write_text(json.dumps(plans))
    by_nibabel = evaluate(pred, gt).report
    assert load_task(pred / "dataset.json", pred / "plans.json").reader.__name__ == "NibabelIO"
    (pred / "plans.json").unlink()
    by_sitk = evaluate(pred, gt).report
    assert by_nibabel["mean"]["1"] == pytest.approx(by_sitk["mean"]["1"])


@pytest.mark.parametrize(
    "content", [{"labels": {"organ": 1}, "file_ending": ".nii.gz"}, {"file_ending": ".nii.gz"}, {"labels": LABELS}]
)
def test_unusable_dataset_json_is_one_clear_error(tmp_path, content):
    pred, gt = make_folders(tmp_path, cases=1, npz=False)
    (pred / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="nnU-Net cannot use .*dataset.json"):
        evaluate(pred, gt)


def test_wrong_calls_are_refused_before_any_work(tmp_path, capsys):
    pred, gt = make_folders(tmp_path, cases=1)
    call = ["evaluate", "-pred", str(pred), "-gt", str(gt)]
    for extra, message in (
        (["--nsd-tolerance", "-1"], "nsd_tolerance"),
        (["--band", "nan"], "band_mm"),
        (["--bins", "0"], "bins"),
        (["-np", "0"], "-np"),
    ):
        assert main([*call, *extra]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", "-pred", str(pred)]) == 1
    assert main(["evaluate", "-pred", str(pred), "-gt", str(tmp_path / "none")]) == 1
    assert not (pred / OUTPUTS[0]).exists()


def test_jobs_and_results_reach_worker_processes(tmp_path):
    pred, gt = make_folders(tmp_path, cases=1)
    task = load_task(pred / "dataset.json")
    (case,), _ = find_cases(pred, gt, task)
    job = pickle.loads(pickle.dumps((case, task, Options())))
    result = pickle.loads(pickle.dumps(score_case(*job)))
    assert result.statistics["all"][0].n == reference_of(0).size


def test_a_write_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_result(file, "first")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        write_result(file, "second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
