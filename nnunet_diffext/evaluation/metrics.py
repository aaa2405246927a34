"""Dice, Jaccard, HD95 and ASD per case and label, with one stated policy for empty masks.

Implementation and options, to be quoted with the numbers (other libraries differ by up to a third in ASD):
  * HD95 and ASD: MONAI, ``compute_hausdorff_distance(percentile=95, directed=False)`` and
    ``compute_average_surface_distance(symmetric=True)``, Euclidean, with the image's spacing in mm. Surfaces are
    the voxels a mask loses under one erosion by a 6-neighbourhood; voxels at the border of the image belong to them.
    HD95 is the larger of the two directed 95th percentiles; ASD pools the distances of both directions.
  * Dice = 2 TP / (2 TP + FP + FN), Jaccard = TP / (TP + FP + FN), voxel counts.

Empty masks:
  * both empty: every metric NaN, left out of the means and counted in ``both_empty`` (nnU-Net does the same for Dice);
  * exactly one empty: Dice and Jaccard 0; HD95, ASD NaN, left out of their means, counted in ``surface_undefined``.

Voxels that the reference marks as ignored are left out of the counts and are background in both masks for the surfaces.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

METRICS = ("dice", "jaccard", "hd95", "asd")
IMPLEMENTATION = (
    "Dice, Jaccard: voxel counts; HD95: MONAI compute_hausdorff_distance(percentile=95), symmetric; "
    "ASD: MONAI compute_average_surface_distance(symmetric=True), both directions pooled; mm; "
    "both masks empty: case left out; one empty: Dice and Jaccard 0, surface metrics left out"
)
Label = int | Sequence[int]


def _crop_to_union(prediction: np.ndarray, reference: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of the union of two masks that are not both empty."""
    union = prediction | reference
    axes = range(union.ndim)
    extents = [np.flatnonzero(union.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    return tuple(slice(int(e[0]), int(e[-1]) + 1) for e in extents)


def _surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """(HD95, ASD) in mm of two non-empty boolean masks."""
    # Here, not at the top: MONAI takes seconds to import and not every user of this module has surfaces to measure.
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    box = _crop_to_union(prediction, reference)
    pred, ref = (torch.from_numpy(np.ascontiguousarray(m[box]))[None, None].float() for m in (prediction, reference))
    spacing = [float(s) for s in spacing]
    with warnings.catch_warnings():
        # MONAI 1.6 passes itself an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*get_mask_edges", category=FutureWarning)
        hd95 = compute_hausdorff_distance(pred, ref, include_background=True, percentile=95, spacing=spacing)
        asd = compute_average_surface_distance(pred, ref, include_background=True, symmetric=True, spacing=spacing)
    return float(hd95), float(asd)


def mask_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    ignore: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of one binary mask.

    Args:
        prediction: boolean, 2D or 3D.
        reference: boolean, same shape.
        spacing: voxel size in mm in the order of the array's axes.
        ignore: boolean, same shape; voxels that count for nothing.

    Returns:
        ``dice``, ``jaccard`` in [0, 1], ``hd95``, ``asd`` in mm; NaN where the module's empty-mask policy says so.

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
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return dict.fromkeys(METRICS, math.nan)
    result = {"dice": 2 * intersection / total, "jaccard": intersection / (total - intersection)}
    if prediction.any() and reference.any():
        result["hd95"], result["asd"] = _surface_distances(prediction, reference, spacing)
    else:
        result["hd95"] = result["asd"] = math.nan
    return result


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    labels: Mapping[str, Label],
    ignore_label: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of every foreground label or region of one case.

    Args:
        prediction: integer label map, 2D or 3D.
        reference: integer label map, same shape.
        spacing: voxel size in mm in the order of the array's axes.
        labels: name -> label, or the labels that make up a region, as in nnU-Net's dataset.json; entries for label 0
            and for ``ignore_label`` are skipped.
        ignore_label: value in ``reference`` that means "not annotated".
    """
    ignore = None if ignore_label is None else reference == ignore_label
    result = {}
    for name, label in labels.items():
        values = [label] if isinstance(label, int) else list(label)
        if values in ([0], [ignore_label]):
            continue
        result[name] = mask_metrics(np.isin(prediction, values), np.isin(reference, values), spacing, ignore)
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
    """Means over cases per label, with the number of ``cases``, of ``both_empty`` and of ``surface_undefined`` ones."""
    result: dict[str, dict[str, float]] = {}
    for name in next(iter(cases.values())):
        rows = [case[name] for case in cases.values()]
        result[name] = {metric: _mean(row[metric] for row in rows) for metric in METRICS}
        both_empty = sum(math.isnan(row["dice"]) for row in rows)
        result[name]["cases"] = len(rows)
        result[name]["both_empty"] = both_empty
        result[name]["surface_undefined"] = sum(math.isnan(row["hd95"]) for row in rows) - both_empty
    return result


def evaluate_folder(
    pred_dir: str | Path,
    gt_dir: str | Path,
    labels: Mapping[str, Label],
    ignore_label: int | None = None,
    file_ending: str = ".nii.gz",
    cases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score a folder of predicted label maps against the references of the same names.

    Args:
        pred_dir: folder with ``CASE + file_ending``.
        gt_dir: folder with the references; it may hold more cases.
        labels: see `case_metrics`.
        ignore_label: see `case_metrics`.
        file_ending: of both folders, with the dot.
        cases: cases that must be there; None for all in ``pred_dir``.

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
        result[case] = case_metrics(prediction, reference, spacing, labels, ignore_label)
    return {"cases": result, "mean": summarise(result), "implementation": IMPLEMENTATION}


def json_ready(report: Any) -> Any:
    """The same structure with NaN replaced by None: json has no NaN and strict readers refuse it."""
    if isinstance(report, Mapping):
        return {key: json_ready(value) for key, value in report.items()}
    return None if isinstance(report, float) and math.isnan(report) else report


def save_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the result of `evaluate_folder` as strict json."""
    Path(path).write_text(json.dumps(json_ready(report), indent=1, allow_nan=False) + "\n")
