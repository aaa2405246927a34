"""Scores without a reference, and the table that collects them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from nnunet_diffext.inference.quality import QualityTable, expected_dice, score_prediction, voxel_volume_ml

FOREGROUND = {"ball": ((1,), 1), "core": ((2,), 2)}


def scores_of(p: np.ndarray, **options) -> dict:
    flat = np.full(p.shape[1:], 0.25)
    return score_prediction(p.argmax(0), p, flat, flat / 2, foreground=FOREGROUND, voxel_ml=0.5, **options)


def test_expected_dice_by_hand() -> None:
    p = np.array([0.9, 0.6, 0.4, 0.0])
    assert expected_dice(p, p > 0.5) == pytest.approx(2 * 1.5 / (1.9 + 2))
    assert expected_dice(np.ones(4), np.ones(4, bool)) == 1
    assert math.isnan(expected_dice(p, p > 2))


def test_calibrated_probabilities_expect_the_dice_they_get() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 0.5, 200_000)
    truth, predicted = rng.random(p.size) < p, p > 0.5
    real = 2 * (truth & predicted).sum() / (truth.sum() + predicted.sum())
    assert expected_dice(p, predicted) == pytest.approx(real, abs=0.005)
    confident = p**3 / (p**3 + (1 - p) ** 3)
    assert expected_dice(confident, predicted) > real + 0.03, "over-confidence must show"


def test_scores_of_a_case() -> None:
    p = np.zeros((3, 2, 2, 2))
    p[0] = 1
    p[:, 0, 0, 0] = (0.1, 0.9, 0.0)
    p[:, 0, 0, 1] = (0.4, 0.6, 0.0)
    found = scores_of(p, agreement=0.75)
    ball, core = found["labels"]["ball"], found["labels"]["core"]
    assert ball["expected_dice"] == pytest.approx(3 / 3.5) and found["quality"] == ball["expected_dice"]
    assert ball["volume_ml"] == 1.0 and ball["expected_volume_ml"] == pytest.approx(0.75)
    assert math.isnan(core["expected_dice"]) and core["volume_ml"] == 0
    assert (found["entropy"], found["mutual_information"], found["agreement"]) == (0.25, 0.125, 0.75)


def test_nothing_predicted() -> None:
    p = np.zeros((3, 2, 2, 2))
    p[0] = 1
    found = scores_of(p)
    assert all(math.isnan(found[key]) for key in ("quality", "entropy", "mutual_information", "agreement"))


def test_what_is_expected_and_not_predicted_lowers_the_quality() -> None:
    p = np.zeros((3, 4, 4, 4))
    p[1, 0], p[2, 1:] = 0.9, 0.45  # 16 voxels of ball; of the core, nearly 22 are expected and none is predicted
    p[0] = 1 - p.sum(0)
    found = scores_of(p)
    assert found["labels"]["core"]["expected_dice"] == 0
    assert found["quality"] == pytest.approx(found["labels"]["ball"]["expected_dice"] / 2)
    nothing = scores_of(p * np.array([1, 0, 1]).reshape(3, 1, 1, 1))
    assert nothing["quality"] == 0 and math.isnan(nothing["labels"]["ball"]["expected_dice"])
    few = np.zeros((20,))
    few[:20] = 0.45
    assert math.isnan(expected_dice(few, few > 0.5)), "9 voxels are too few"
    impossible = np.full(10**6, 1e-4)  # the floor of probabilities that are never 0
    assert math.isnan(expected_dice(impossible, impossible > 0.5))


def test_regions_overlap() -> None:
    p = np.array([[0.9, 0.9, 0.1], [0.8, 0.2, 0.0]]).reshape(2, 1, 1, 3)
    segmentation = np.array([2, 1, 0]).reshape(1, 1, 3)
    zero = np.zeros(segmentation.shape)
    foreground = {"whole": ((1, 2), 0), "core": ((2,), 1)}
    found = score_prediction(segmentation, p, zero, zero, foreground=foreground, voxel_ml=1)
    assert found["labels"]["whole"]["expected_dice"] == pytest.approx(3.6 / 3.9)
    assert found["labels"]["core"]["expected_dice"] == pytest.approx(1.6 / 2.0)
    assert found["quality"] == pytest.approx((3.6 / 3.9 + 0.8) / 2)


def test_2d_images_have_no_volume() -> None:
    assert math.isnan(voxel_volume_ml((1, 8, 8), (999, 1, 1)))
    assert voxel_volume_ml((4, 8, 8), (2, 0.5, 0.5)) == pytest.approx(0.5e-3)


def test_the_table_keeps_replaces_and_forgets_rows(tmp_path: Path) -> None:
    p = np.full((3, 2, 2, 2), 1 / 3)
    p[1] += 0.1
    table = QualityTable(tmp_path)
    table.add("b", scores_of(p))
    QualityTable(tmp_path).add("a", scores_of(p, agreement=0.5))  # another process
    table.add("b", scores_of(p, agreement=0.9))
    rows = table.read()
    assert list(rows) == ["a", "b"] and rows["b"]["agreement"] == 0.9
    assert math.isnan(rows["a"]["labels"]["core"]["expected_dice"])
    with open(tmp_path / "quality.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == ["a", "b"]
    assert float(lines[0]["expected_dice_ball"]) == rows["a"]["labels"]["ball"]["expected_dice"]
    assert lines[0]["expected_dice_core"] == "nan"
    json.loads((tmp_path / "quality.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    table.forget({"a"})
    assert list(table.read()) == ["b"]
    table.forget({"b", "unknown"})
    assert table.read() == {}
    assert {f.name for f in tmp_path.iterdir()} <= {"quality.csv", "quality.json", ".quality.lock"}


def test_a_damaged_table_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text("{")
    table = QualityTable(tmp_path)
    assert table.read() == {}
    table.add("a", scores_of(np.full((3, 1, 2, 2), 1 / 3)))
    assert list(table.read()) == ["a"]
