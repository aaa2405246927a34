"""Labels that nobody looked for in a case are not scored there: a prediction of one is neither right nor wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prediction_folders import LABELS, REGIONS, make_folders, reference_of, write_labels

from nnunet_diffext.cli.main import main
from nnunet_diffext.evaluation.calibration import calibration
from nnunet_diffext.evaluation.cases import read_probabilities
from nnunet_diffext.evaluation.folder import evaluate_predictions
from nnunet_diffext.evaluation.task import OUTPUTS

ORGAN_ONLY = {"modalities": {"case_0": "CT", "case_1": "MR", "case_2": "CT"}, "annotated": {"MR": ["organ"]}}


def folders(tmp_path: Path, labels: Mapping[str, Any], diffext: Mapping[str, Any]) -> tuple[Path, Path]:
    """Three cases; in case_1 nobody looked for tumours."""
    pred, gt = make_folders(tmp_path, labels=labels)
    write_labels(gt / "case_1.nii.gz", reference_of(1) > 0)
    file = pred / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"diffext": diffext}))
    return pred, gt


def report_of(pred: Path, gt: Path) -> dict[str, Any]:
    evaluate_predictions(pred, gt, num_processes=1)
    return json.loads((pred / OUTPUTS[0]).read_text())


def test_label_that_nobody_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred, gt = folders(tmp_path, LABELS, ORGAN_ONLY)
    report = report_of(pred, gt)
    first, partly, last = (row["metrics"] for row in report["metric_per_case"])
    assert set(partly["2"]) == set(first["2"]) and set(partly["2"].values()) == {None}
    assert partly["1"]["Dice"] > 0.5 and partly["1"]["FN"] > 0, "the tumour that was predicted hides organ"
    assert report["mean"]["2"]["Dice"] == pytest.approx((first["2"]["Dice"] + last["2"]["Dice"]) / 2)
    assert [report["counts"][key]["cases"] for key in "12"] == [3, 2]
    assert report["not_annotated"] == {"case_1": ["tumour"]}
    assert "case_1,2,tumour,,,," in (pred / OUTPUTS[1]).read_text()
    assert main(["evaluate", "-pred", str(pred), "-gt", str(gt), "-np", "1"]) == 0
    said = capsys.readouterr().err
    assert "1 case(s) are without scores of labels not annotated there: tumour" in said
    assert "otherwise than the segmentation" not in said


def test_probabilities_of_such_a_label_are_those_of_background(tmp_path: Path) -> None:
    pred, gt = folders(tmp_path, LABELS, ORGAN_ONLY)
    report = report_of(pred, gt)
    p = read_probabilities(pred / "case_1.npz")
    merged = np.stack([p[0] + p[2], p[1], 0 * p[2]])
    expected = calibration(merged, (reference_of(1) > 0).astype(int)).as_dict()
    row = report["metric_per_case"][1]
    assert row["calibration"]["nll"] == pytest.approx(expected["nll"])
    assert row["calibration"]["ece"] == pytest.approx(expected["ece"])
    assert row["metrics"]["2"]["nll"] is None
    tumour = [report["metric_per_case"][i]["metrics"]["2"]["brier"] for i in (0, 2)]
    assert report["calibration"]["pooled"]["2"]["brier"] == pytest.approx(np.mean(tumour)), "of two cases"


def test_region_that_nobody_looked_for(tmp_path: Path) -> None:
    pred, gt = folders(tmp_path, REGIONS, {**ORGAN_ONLY, "annotated": {"MR": ["whole"]}})
    report = report_of(pred, gt)
    everything = report_of(*make_folders(tmp_path / "all", labels=REGIONS))
    row, same = (r["metric_per_case"][1] for r in (report, everything))
    whole, tumour = "(1, 2)", "(2,)"
    assert row["metrics"][whole] == same["metrics"][whole], "the tumour is a part of it"
    assert set(row["metrics"][tumour].values()) == {None}
    assert row["calibration"]["nll"] == pytest.approx(row["metrics"][whole]["nll"])


def test_cases_that_the_file_does_not_name_are_scored_on_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test images, for example. What was annotated can be written down for them, too."""
    named = {"modalities": {"case_0": "CT", "other": "MR"}, "annotated": {"MR": ["organ"]}}
    pred, gt = folders(tmp_path, LABELS, named)
    report = report_of(pred, gt)
    assert report["not_annotated"] == {} and report["without_modality"] == ["case_1", "case_2"]
    assert report["metric_per_case"][1]["metrics"]["2"]["FP"] > 0
    assert main(["evaluate", "-pred", str(pred), "-gt", str(gt), "-np", "1"]) == 0
    assert "2 case(s) are scored on every label, since dataset.json" in capsys.readouterr().err
    pred, gt = folders(tmp_path / "complete", LABELS, {"modalities": {"case_0": "CT"}})
    assert report_of(pred, gt)["without_modality"] == [], "nothing to know about them"


def test_reference_that_holds_such_a_label_all_the_same(tmp_path: Path) -> None:
    """It counts as background, as in the prediction: its probability there is zero, which no score may punish."""
    pred, gt = folders(tmp_path, LABELS, ORGAN_ONLY)
    write_labels(gt / "case_1.nii.gz", reference_of(1))
    row = report_of(pred, gt)["metric_per_case"][1]
    p = read_probabilities(pred / "case_1.npz")
    merged = np.stack([p[0] + p[2], p[1], 0 * p[2]])
    reference = reference_of(1)
    assert (reference == 2).any()
    expected = calibration(merged, np.where(reference == 2, 0, reference)).as_dict()
    assert row["calibration"]["nll"] == pytest.approx(expected["nll"])
