"""Evaluation of folders: same numbers as nnU-Net and as the arrays give, and what happens to bad cases."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
from matplotlib.image import imread
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, load_summary_json
from prediction_folders import (
    LABELS,
    REGIONS,
    SPACING,
    evaluate,
    make_folders,
    read_summary,
    reference_of,
    write_labels,
)

from nnunet_diffext.evaluation.calibration import calibration, label_calibration
from nnunet_diffext.evaluation.cases import foreground_band
from nnunet_diffext.evaluation.folder import by_name
from nnunet_diffext.evaluation.metrics import METRICS
from nnunet_diffext.evaluation.task import OUTPUTS, Options, load_task


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_layout_and_values_are_those_of_nnunet(tmp_path, labels):
    pred, gt = make_folders(tmp_path, npz=False, labels=labels)
    evaluate(pred, gt)
    task = load_task(pred / "dataset.json")
    names = {"1": "organ", "2": "tumour"} if labels is LABELS else {"(1, 2)": "whole", "(2,)": "tumour"}
    assert dict(task.names) == names
    ours = load_summary_json(str(pred / OUTPUTS[0]))
    regions = list(ours["mean"])
    for row in ours["metric_per_case"]:
        theirs = compute_metrics(row["reference_file"], row["prediction_file"], task.reader(), regions)
        for region in regions:
            for metric, value in theirs["metrics"][region].items():
                assert row["metrics"][region][metric] == pytest.approx(value), metric
    assert 0.5 < ours["foreground_mean"]["Dice"] < 1
    for metric in ("Dice", "HD95", "NSD", "volume_ref_ml"):
        rows = [[row["metrics"][r][metric] for row in ours["metric_per_case"]] for r in regions]
        assert [ours["mean"][r][metric] for r in regions] == pytest.approx(np.mean(rows, 1).tolist())
        assert ours["foreground_mean"][metric] == pytest.approx(np.mean(rows))
    voxels = np.count_nonzero(np.isin(reference_of(0), regions[0]))
    volume = ours["metric_per_case"][0]["metrics"][regions[0]]["volume_ref_ml"]
    assert volume == pytest.approx(voxels * np.prod(SPACING) / 1000)
    assert not (pred / "reliability.png").exists() and "calibration" not in ours


def test_metrics_by_name_with_the_spacing_of_the_files_and_empty_cases_counted(tmp_path):
    pred, gt = make_folders(tmp_path, cases=0)
    planes = np.zeros((2, 12, 13, 14))
    planes[0, 2], planes[1, 5] = 1, 1
    empty = np.zeros((12, 13, 14))
    for case, p, r in (("shifted", *planes), ("nothing", empty, empty), ("missed", empty, planes[0])):
        write_labels(pred / f"{case}.nii.gz", p)
        write_labels(gt / f"{case}.nii.gz", r)
    result = by_name(evaluate(pred, gt).report)
    assert sorted(result["cases"]) == ["missed", "nothing", "shifted"]
    assert list(result["mean"]) == ["organ", "tumour"] and "hd95" in result["implementation"].lower()
    mean = result["mean"]["organ"]
    assert (mean["cases"], mean["both_empty"], mean["surface_undefined"], mean["reference_empty"]) == (3, 1, 1, 1)
    assert mean["dice"] == mean["jaccard"] == mean["nsd"] == 0
    assert mean["hd95"] == mean["asd"] == pytest.approx(3 * SPACING[0])
    assert set(result["cases"]["shifted"]["organ"]) == set(METRICS)
    assert math.isnan(result["cases"]["nothing"]["organ"]["dice"])


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_probabilities_of_another_prediction_are_noted(tmp_path, labels):
    pred, gt = make_folders(tmp_path, labels=labels)
    assert evaluate(pred, gt).remarks() == []
    shift = np.roll(reference_of(1), 3, axis=1)
    write_labels(pred / "case_1.nii.gz", shift)
    (note,) = evaluate(pred, gt).remarks()
    assert note.startswith("case_1: ") and "case_1.npz decides" in note and "of two predictions" in note


def test_calibration_is_that_of_the_arrays(tmp_path):
    pred, gt = make_folders(tmp_path)
    report = evaluate(pred, gt, options=Options(band_mm=0.5)).report
    everything, bands, organ = [], [], []
    for index, row in enumerate(report["metric_per_case"]):
        p, y = np.load(pred / f"case_{index}.npz")["probabilities"], reference_of(index)
        band = foreground_band((y > 0) | (p.argmax(0) > 0), SPACING, 0.5)
        everything.append(calibration(p, y))
        bands.append(calibration(p, y, mask=band))
        organ.append(label_calibration(p[1], y == 1))
        for metric in ("nll", "brier", "ece", "ace", "mce", "aurc", "eaurc"):
            assert row["calibration"][metric] == pytest.approx(getattr(everything[-1], metric)), metric
            assert row["calibration"][metric + "_band"] == pytest.approx(getattr(bands[-1], metric)), metric
            assert row["metrics"]["1"][metric] == pytest.approx(getattr(organ[-1], metric)), metric
    assert 0 < bands[0].n < everything[0].n
    section = report["calibration"]
    assert section["mean"]["ece"] == pytest.approx(np.mean([c.ece for c in everything]))
    assert section["pooled"]["all"]["ece"] == pytest.approx(sum(everything[1:], everything[0]).ece)
    assert section["pooled"]["all"]["ece_band"] == pytest.approx(sum(bands[1:], bands[0]).ece)
    assert section["pooled"]["1"]["brier"] == pytest.approx(sum(organ[1:], organ[0]).brier)
    counts = sum(c.table[0] for c in everything)
    assert section["reliability"]["all"]["image"]["count"] == counts.tolist() and section["cases"] == 3


def test_regions_and_ignore_label(tmp_path):
    pred, gt = make_folders(tmp_path, cases=1, labels={**REGIONS, "ignore": 3})
    reference = reference_of(0)
    reference[:3] = 3
    write_labels(gt / "case_0.nii.gz", reference)
    result = evaluate(pred, gt)
    assert result.failed == {}
    p = np.load(pred / "case_0.npz")["probabilities"]
    kept = calibration(p[:, 3:], np.stack([reference[3:] > 0, reference[3:] == 2]), regions=True)
    row = result.report["metric_per_case"][0]
    assert row["calibration"]["nll"] == pytest.approx(kept.nll) and row["calibration"]["ece"] == pytest.approx(kept.ece)
    whole = label_calibration(p[0, 3:], reference[3:] > 0)
    assert row["metrics"]["(1, 2)"]["ece"] == pytest.approx(whole.ece)
    assert row["metrics"]["(1, 2)"]["n_ref"] == np.count_nonzero(reference[3:])
    # What is predicted where the reference is ignored does not matter, nor does its probability.
    prediction = np.where(p[1] > 0.5, 2, np.where(p[0] > 0.5, 1, 0))
    prediction[:3], p[:, :3] = 2, 0.99
    write_labels(pred / "case_0.nii.gz", prediction)
    np.savez_compressed(pred / "case_0.npz", probabilities=p)
    again = evaluate(pred, gt).report["metric_per_case"][0]
    for metric in ("Dice", "HD95", "NSD", "volume_error", "nll", "ece", "aurc"):
        assert again["metrics"]["(1, 2)"][metric] == pytest.approx(row["metrics"]["(1, 2)"][metric]), metric


def test_band_is_in_mm_along_every_axis():
    foreground = np.zeros((9, 21, 41), bool)
    foreground[4, 10, 20] = True
    band = foreground_band(foreground, SPACING, 6.0)
    assert [np.flatnonzero(line).tolist() for line in (band[:, 10, 20], band[4, :, 20], band[4, 10])] == [
        [2, 3, 4, 5, 6], list(range(4, 17)), list(range(8, 33))
    ]  # fmt: skip
    assert not foreground_band(np.zeros((3, 3), bool), (1.0, 1.0), 5.0).any()
    assert foreground_band(foreground, SPACING, 0.0).sum() == 1


def test_files_agree_and_undefined_values_are_empty(tmp_path):
    pred, gt = make_folders(tmp_path, cases=2)
    empty = np.zeros_like(reference_of(0))
    write_labels(gt / "case_0.nii.gz", empty)
    result = evaluate(pred, gt)
    summary = read_summary(pred)
    rows = list(csv.DictReader(io.StringIO((pred / OUTPUTS[1]).read_text())))
    assert [(r["case"], r["label"], r["name"]) for r in rows] == [
        (case, *label) for case in ("case_0", "case_1") for label in (("1", "organ"), ("2", "tumour"))
    ]
    for row in rows:
        (entry,) = (e for e in summary["metric_per_case"] if e["case"] == row["case"])
        expected = entry["metrics"][row["label"]]
        assert {k: float(v) if v else None for k, v in row.items() if k not in ("case", "label", "name")} == expected
    assert rows[0]["HD95"] == rows[0]["volume_error"] == "" and float(rows[0]["Dice"]) == float(rows[0]["NSD"]) == 0
    assert summary["counts"]["1"] == {"cases": 2, "both_empty": 0, "surface_undefined": 1, "reference_empty": 1}
    assert "tolerance 2 mm" in summary["implementation"] and "monai" in summary["provenance"]["versions"]
    assert [f.name for f in result.files] == list(OUTPUTS) and all(f.is_file() for f in result.files)


def test_pictures_are_drawn(tmp_path):
    pred, gt = make_folders(tmp_path, cases=1)
    evaluate(pred, gt, out=tmp_path / "out", options=Options(band_mm=0.5))
    for name in OUTPUTS[2:]:
        picture = imread(tmp_path / "out" / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 600
        # The first two colours of tab10; many more pixels than the legend has.
        for colour in ((31, 119, 180), (255, 127, 14)):
            distance = np.abs(255 * picture[..., :3] - colour).sum(-1)
            assert np.count_nonzero(distance < 6) > 400, (name, colour)
