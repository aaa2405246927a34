"""Dice, Jaccard, HD95, ASD, NSD and volumes of a mask, with one stated policy for empty masks.

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

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_diffext.evaluation.surface import NSD_TOLERANCE_MM, surface_metrics

METRICS = ("dice", "jaccard", "hd95", "asd", "nsd", "volume_pred_ml", "volume_ref_ml", "volume_error")


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


def read_label_map(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Label map as nnU-Net's arrays are ordered, (z, y, x) or (y, x), and its spacing in mm in the same order."""
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), tuple(reversed(image.GetSpacing()))


def json_ready(report: Any) -> Any:
    """The same structure with NaN replaced by None: json has no NaN and strict readers refuse it."""
    if isinstance(report, Mapping):
        return {key: json_ready(value) for key, value in report.items()}
    if isinstance(report, (list, tuple)):
        return [json_ready(value) for value in report]
    return None if isinstance(report, float) and math.isnan(report) else report
