"""How good a prediction expects itself to be: scores per case without a reference.

    expected_dice       2 sum p [predicted] / (sum p + sum [predicted]), the Dice that the model itself expects: close
                        to it for many voxels if its probabilities are calibrated. A label that is not predicted: 0 if
                        it is expected all the same (see EXPECTED_VOXELS), else NaN.
    volume_ml           of the segmentation; expected_volume_ml: sum of p. NaN for 2D images, which have no volume.
    entropy             mean over the predicted foreground of the predictive entropy, in [0, 1]
    mutual_information  mean over the predicted foreground, in [0, 1]
    agreement           mean pairwise Dice of the samples; NaN without
    quality             mean of expected_dice over the labels that are predicted or expected

Probabilities are the final ones, after temperature scaling; entropy and mutual information are those of the ensemble.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nnunet_diffext.files import QUALITY, write_atomically

FILES = (QUALITY, "quality.json")
OVERALL = ("quality", "entropy", "mutual_information", "agreement")
PER_LABEL = ("expected_dice", "volume_ml", "expected_volume_ml")
EXPECTED_VOXELS, EXPECTED_FROM = 10, 0.05
"""A label that is not predicted is expected if its p sum to so many voxels, over voxels with at least this p: where
the label is impossible, its p is small but not 0, and many such voxels add up."""

Scores = dict[str, Any]
"""``OVERALL`` -> float, and ``"labels"``: name -> ``PER_LABEL`` -> float."""


def expected_dice(probability: np.ndarray, predicted: np.ndarray) -> float:
    """Dice that calibrated probabilities ``(*)`` expect of a segmentation ``(*)``; of an empty one 0 where there should
    be something (:data:`EXPECTED_VOXELS`), else NaN."""
    size = np.count_nonzero(predicted)
    if not size:
        missed = float(probability[probability >= EXPECTED_FROM].sum(dtype=np.float64))
        return 0.0 if missed >= EXPECTED_VOXELS else math.nan
    hit = float(probability[predicted].sum(dtype=np.float64))
    return 2 * hit / (float(probability.sum(dtype=np.float64)) + size)


def score_prediction(
    segmentation: np.ndarray,
    probabilities: np.ndarray,
    entropy: np.ndarray,
    mutual_information: np.ndarray,
    *,
    foreground: Mapping[str, tuple[tuple[int, ...], int]],
    voxel_ml: float,
    agreement: float = math.nan,
) -> Scores:
    """All scores of one case.

    Args:
        segmentation: ``(*)`` labels.
        probabilities: ``(K, *)``.
        entropy: ``(*)``.
        mutual_information: ``(*)``.
        foreground: name -> label values, index of the probability.
        voxel_ml: volume of a voxel, NaN if unknown.
        agreement: of the samples.
    """
    labels: dict[str, dict[str, float]] = {}
    for name, (values, channel) in foreground.items():
        predicted, p = np.isin(segmentation, values), probabilities[channel]
        labels[name] = {
            "expected_dice": expected_dice(p, predicted),
            "volume_ml": np.count_nonzero(predicted) * voxel_ml,
            "expected_volume_ml": float(p.sum(dtype=np.float64)) * voxel_ml,
        }
    dice = [s["expected_dice"] for s in labels.values() if not math.isnan(s["expected_dice"])]
    anything = segmentation > 0
    empty = not anything.any()
    return {
        "quality": float(np.mean(dice)) if dice else math.nan,
        "entropy": math.nan if empty else float(entropy[anything].mean(dtype=np.float64)),
        "mutual_information": math.nan if empty else float(mutual_information[anything].mean(dtype=np.float64)),
        "agreement": agreement,
        "labels": labels,
    }


def voxel_volume_ml(shape: tuple[int, ...], spacing: Any) -> float:
    """Millilitres per voxel; NaN for 2D images, to which nnU-Net gives one slice and a made-up distance."""
    return math.nan if shape[0] == 1 else float(np.prod(spacing)) / 1000


class QualityTable:
    """``quality.json`` and ``quality.csv`` of an output folder. Several processes may write to one folder.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(str(folder / ".quality.lock"))

    def read(self) -> dict[str, Scores]:
        """Case -> scores; nothing without a file, or if it is damaged."""
        file = self.folder / "quality.json"
        try:
            cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {case: _restore(scores) for case, scores in cases.items()}

    def add(self, case: str, scores: Scores) -> None:
        """Add or replace one row; both files are replaced in one step each."""
        with self._lock:
            self._write({**self.read(), case: scores})

    def forget(self, cases: Collection[str]) -> None:
        """Remove these rows."""
        with self._lock:
            rows = self.read()
            kept = {c: s for c, s in rows.items() if c not in cases}
            if len(kept) < len(rows):
                self._write(kept)

    def _write(self, rows: dict[str, Scores]) -> None:
        rows = dict(sorted(rows.items()))
        content = {"cases": {case: _without_nan(scores) for case, scores in rows.items()}}
        names = list(dict.fromkeys(name for scores in rows.values() for name in scores["labels"]))
        columns = ["case", *OVERALL, *(f"{key}_{name}" for name in names for key in PER_LABEL)]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, columns, restval=math.nan)
        table.writeheader()
        table.writerows(_flat(case, scores) for case, scores in rows.items())
        write_atomically(self.folder / QUALITY, text.getvalue())
        write_atomically(self.folder / "quality.json", json.dumps(content, indent=2))  # read by --continue_prediction


def _flat(case: str, scores: Scores) -> dict[str, Any]:
    labels = {f"{key}_{name}": values[key] for name, values in scores["labels"].items() for key in PER_LABEL}
    return {"case": case, **{key: scores[key] for key in OVERALL}, **labels}


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(v) for key, v in value.items()}
    return math.nan if value is None else value
