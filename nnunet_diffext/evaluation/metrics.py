"""Dice, Jaccard, HD95, ASD, NSD and volumes per case and label, with one stated policy for empty masks.

Implementation and options, to be quoted with the numbers (other libraries differ by up to a third in ASD):
  * HD95 and ASD: MONAI, ``compute_hausdorff_distance(percentile=95, directed=False)`` and
    ``compute_average_surface_distance(symmetric=True)``, Euclidean, with the image's spacing in mm. Surfaces are
    the voxels a mask loses under one erosion by a 6-neighbourhood; voxels at the border of the image belong to them.
    HD95 is the larger of the two directed 95th percentiles; ASD pools the distances of both directions.
  * NSD: MONAI, ``compute_surface_dice(use_subvoxels=True)``: the share of the area of both surfaces that lies within
    the tolerance of the other one. Why not voxels: see `nnunet_diffext.evaluation.surface`.
  * Dice = 2 TP / (2 TP + FP + FN), Jaccard = TP / (TP + FP + FN), voxel counts.
  * Volumes in ml, of 3D masks; volume error = (V_prediction - V_reference) / V_reference, signed.

Empty masks:
  * both empty: every metric NaN, left out of the means and counted in ``both_empty`` (nnU-Net does the same for Dice);
  * exactly one empty: Dice, Jaccard and NSD 0; HD95, ASD NaN, left out of their means, counted in
    ``surface_undefined``;
  * the volume of an empty mask is 0 in every case; without reference volume the relative error is NaN, left out of the
    mean and counted in ``reference_empty``.

Voxels that the reference marks as ignored are left out of the counts and are background in both masks for the surfaces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_diffext.evaluation.surface import NSD_TOLERANCE_MM, surface_metrics

METRICS = ("dice", "jaccard", "hd95", "asd", "nsd", "volume_pred_ml", "volume_ref_ml", "volume_error")
Label = int | Sequence[int]


def implementation(nsd_tolerance: float = NSD_TOLERANCE_MM) -> str:
    """What computed the metrics and with which options: belongs beside every number."""
    return (
        "Dice, Jaccard: voxel counts; HD95: MONAI compute_hausdorff_distance(percentile=95), symmetric; "
        "ASD: MONAI compute_average_surface_distance(symmetric=True), both directions pooled; mm; "
        f"NSD: MONAI compute_surface_dice(use_subvoxels=True), tolerance {nsd_tolerance:g} mm; "
        "volume error: (prediction - reference) / reference; "
        "both masks empty: case left out; one empty: Dice, Jaccard and NSD 0, HD95 and ASD left out; "
        "reference empty: volume error left out"
    )


def mask_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    ignore: np.ndarray | None = None,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
) -> dict[str, float]:
    """Metrics of one binary mask.

    Args:
        prediction: boolean, 2D or 3D.
        reference: boolean, same shape.
        spacing: voxel size in mm in the order of the array's axes.
        ignore: boolean, same shape; voxels that count for nothing.
        nsd_tolerance: in mm.

    Returns:
        ``dice``, ``jaccard``, ``nsd`` in [0, 1], ``hd95``, ``asd`` in mm, ``volume_pred_ml``, ``volume_ref_ml`` (NaN in
        2D, where there is no volume), ``volume_error`` from -1; NaN where the module's empty-mask policy says so.

    Raises:
        ValueError: shapes or the number of spacings differ.
    """
    if prediction.shape != reference.shape or len(spacing) != prediction.ndim:
        raise ValueError(
            f"prediction {prediction.shape}, reference {reference.shape} and spacing {tuple(spacing)} do not fit"
        )
    prediction, reference = prediction.astype(bool), reference.astype(bool)
    if ignore is not None:
        prediction, reference = prediction & ~ignore, reference & ~ignore
    intersection = int(np.count_nonzero(prediction & reference))
    predicted, expected = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    total = predicted + expected
    result = dict.fromkeys(METRICS, math.nan)
    if prediction.ndim == 3:
        voxel_ml = math.prod(float(s) for s in spacing) / 1000
        result |= {"volume_pred_ml": predicted * voxel_ml, "volume_ref_ml": expected * voxel_ml}
    if expected:
        result["volume_error"] = (predicted - expected) / expected
    if total:
        result |= {"dice": 2 * intersection / total, "jaccard": intersection / (total - intersection), "nsd": 0.0}
    if predicted and expected:
        result |= surface_metrics(prediction, reference, spacing, nsd_tolerance)
    return result


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    labels: Mapping[str, Label],
    ignore_label: int | None = None,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
) -> dict[str, dict[str, float]]:
    """Metrics of every foreground label or region of one case.

    Args:
        prediction: integer label map, 2D or 3D.
        reference: integer label map, same shape.
        spacing: voxel size in mm in the order of the array's axes.
        labels: name -> label, or the labels that make up a region, as in nnU-Net's dataset.json; entries for label 0
            and for ``ignore_label`` are skipped.
        ignore_label: value in ``reference`` that means "not annotated".
        nsd_tolerance: in mm.
    """
    ignore = None if ignore_label is None else reference == ignore_label
    result = {}
    for name, label in labels.items():
        values = [label] if isinstance(label, int) else list(label)
        if values in ([0], [ignore_label]):
            continue
        masks = np.isin(prediction, values), np.isin(reference, values)
        result[name] = mask_metrics(*masks, spacing, ignore, nsd_tolerance)
    return result


def read_label_map(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Label map as nnU-Net's arrays are ordered, (z, y, x) or (y, x), and its spacing in mm in the same order."""
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), tuple(reversed(image.GetSpacing()))


def _read_pair(prediction_file: Path, reference_file: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    for file, role in ((prediction_file, "prediction"), (reference_file, "reference")):
        if not file.is_file():
            raise FileNotFoundError(f"no {role} {file}; every evaluated case needs a prediction and a reference")
    prediction, predicted_spacing = read_label_map(prediction_file)
    reference, spacing = read_label_map(reference_file)
    if prediction.shape != reference.shape or not np.allclose(predicted_spacing, spacing, rtol=1e-3):
        raise ValueError(
            f"{prediction_file} has shape {prediction.shape} and spacing {predicted_spacing}, but {reference_file} has "
            f"{reference.shape} and {spacing}: predictions must be in the geometry of the reference"
        )
    return prediction, reference, spacing


def _mean(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def summarise(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over cases per label, with the number of ``cases``, ``both_empty``, ``surface_undefined`` and
    ``reference_empty`` ones."""
    result: dict[str, dict[str, float]] = {}
    for name in next(iter(cases.values())):
        rows = [case[name] for case in cases.values()]
        result[name] = {metric: _mean(row[metric] for row in rows) for metric in METRICS}
        both_empty = sum(math.isnan(row["dice"]) for row in rows)
        result[name]["cases"] = len(rows)
        result[name]["both_empty"] = both_empty
        result[name]["surface_undefined"] = sum(math.isnan(row["hd95"]) for row in rows) - both_empty
        result[name]["reference_empty"] = sum(math.isnan(row["volume_error"]) for row in rows)
    return result


def evaluate_folder(
    pred_dir: str | Path,
    gt_dir: str | Path,
    labels: Mapping[str, Label],
    ignore_label: int | None = None,
    file_ending: str = ".nii.gz",
    cases: Sequence[str] | None = None,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
) -> dict[str, Any]:
    """Score a folder of predicted label maps against the references of the same names.

    Args:
        pred_dir: folder with ``CASE + file_ending``.
        gt_dir: folder with the references; it may hold more cases.
        labels: see `case_metrics`.
        ignore_label: see `case_metrics`.
        file_ending: of both folders, with the dot.
        cases: cases that must be there; None for all in ``pred_dir``.
        nsd_tolerance: in mm.

    Returns:
        ``{"cases": {case: {label: metrics}}, "mean": {label: means and counts}, "implementation": str}``; undefined
        values are NaN, see `json_ready`.

    Raises:
        FileNotFoundError: no prediction at all, or one of ``cases`` misses its prediction or reference.
        ValueError: a prediction's geometry is not its reference's.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    if cases is None:
        cases = sorted(p.name.removesuffix(file_ending) for p in pred_dir.glob("*" + file_ending))
    if not cases:
        raise FileNotFoundError(f"no file *{file_ending} in {pred_dir}: nothing to evaluate")
    result = {}
    for case in cases:
        prediction, reference, spacing = _read_pair(pred_dir / (case + file_ending), gt_dir / (case + file_ending))
        result[case] = case_metrics(prediction, reference, spacing, labels, ignore_label, nsd_tolerance)
    return {"cases": result, "mean": summarise(result), "implementation": implementation(nsd_tolerance)}


def json_ready(report: Any) -> Any:
    """The same structure with NaN replaced by None: json has no NaN and strict readers refuse it."""
    if isinstance(report, Mapping):
        return {key: json_ready(value) for key, value in report.items()}
    if isinstance(report, (list, tuple)):
        return [json_ready(value) for value in report]
    return None if isinstance(report, float) and math.isnan(report) else report


def save_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the result of `evaluate_folder` as strict json."""
    Path(path).write_text(json.dumps(json_ready(report), indent=1, allow_nan=False) + "\n")
