"""Scoring of one case: files in, metrics and calibration statistics out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn
from scipy.ndimage import distance_transform_edt

from nnunet_diffext.evaluation import calibration as cal
from nnunet_diffext.evaluation.metrics import mask_metrics
from nnunet_diffext.evaluation.task import Case, Options, Task

RENAMED = {"dice": "Dice", "jaccard": "IoU", "hd95": "HD95", "asd": "ASD", "nsd": "NSD"}
"""Names in `nnunet_diffext.evaluation.metrics` -> names in summary.json, nnU-Net's own where it has the metric."""

DISAGREEING = 0.05
"""A share of the foreground: if more voxels are decided otherwise by the probabilities, it is noted."""

POOLED = "all"
"""Key of the top-label calibration, beside those of the labels."""


@dataclass(frozen=True)
class CaseScore:
    """Result of one case.

    Attributes:
        metrics: label key -> metric -> value, calibration included where there are probabilities. NaN for labels that
            nobody looked for in the case.
        calibration: metric -> value, top-label; empty without probabilities.
        statistics: label key or `POOLED` -> statistics of the whole image and of the band.
        problem: why the probabilities could not be used, or empty.
        notes: what the user should know although it is no error.
    """

    metrics: dict[str, dict[str, float]]
    calibration: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, tuple[cal.Calibration, cal.Calibration]] = field(default_factory=dict)
    problem: str = ""
    notes: tuple[str, ...] = ()


def score_case(case: Case, task: Task, options: Options) -> CaseScore:
    """Metrics of a case, and its calibration if there are probabilities.

    Raises:
        FileNotFoundError: no reference.
        ValueError: a file is damaged, no label map, or prediction and reference differ in shape or spacing.
    """
    prediction, reference, spacing, notes = _read_pair(case, task)
    scored = {key: values for key, values in task.labels.items() if key not in case.unannotated}
    hidden = [value for key in case.unannotated for value in task.labels[key]]
    notes += _unexpected(case, task, reference)
    as_predicted = prediction
    if not task.regions:  # background means "none of the labels that were looked for"
        prediction, reference = (np.where(np.isin(part, hidden), 0, part) for part in (prediction, reference))
    ignored = np.zeros(reference.shape, bool) if task.ignore_label is None else reference == task.ignore_label
    metrics = {}
    # nnU-Net gives 2D images a first axis of length 1 and a made-up spacing.
    flat = reference.shape[0] == 1
    for key, values in scored.items():
        masks = np.isin(prediction, values), np.isin(reference, values)
        counts = compute_tp_fp_fn_tn(masks[1], masks[0], ignored)
        pred, ref, ignore = (m[0] if flat else m for m in (*masks, ignored))
        own = mask_metrics(pred, ref, spacing[flat:], ignore, options.nsd_tolerance)
        tp, fp, fn, _ = counts
        metrics[key] = {RENAMED.get(name, name): value for name, value in own.items()}
        metrics[key] |= {name: float(v) for name, v in zip(("TP", "FP", "FN", "TN"), counts, strict=True)}
        metrics[key] |= {"n_pred": float(tp + fp), "n_ref": float(tp + fn)}
    blank = dict.fromkeys(next(iter(metrics.values())), math.nan)
    metrics = {key: metrics.get(key, blank) for key in task.labels}
    if case.probabilities is None:
        return CaseScore(metrics, notes=notes)
    try:
        probabilities = read_probabilities(case.probabilities)
        known, part = without_unannotated(probabilities, task, case.unannotated)
        statistics = case_statistics(known, prediction, reference, spacing, part, options)
    except ValueError as error:
        return CaseScore(metrics, problem=str(error), notes=notes)
    notes += disagreement(probabilities, as_predicted, task, case.probabilities)
    statistics = {key: pair for key, pair in statistics.items() if key not in case.unannotated}
    pooled = calibration_metrics(*statistics[POOLED])
    blank = dict.fromkeys(pooled, math.nan)
    for key, values in metrics.items():
        metrics[key] = values | (calibration_metrics(*statistics[key]) if key in statistics else blank)
    return CaseScore(metrics, pooled, statistics, notes=notes)


def _unexpected(case: Case, task: Task, reference: np.ndarray) -> tuple[str, ...]:
    """A note if a reference has labels that nobody looked for: it may be that of another dataset, whose values mean
    other labels."""
    scored = {value for key, values in task.labels.items() if key not in case.unannotated for value in values}
    found = [
        task.names[key]
        for key in case.unannotated
        if np.isin(reference, [v for v in task.labels[key] if v not in scored]).any()
    ]
    if not found:
        return ()
    return (
        f"the reference holds {', '.join(map(repr, found))}, not annotated here according to dataset.json, and so not "
        "scored. If the references are those of a dataset that was merged, their values mean other labels: use "
        "labelsTs or labelsTr of the merged dataset",
    )


def without_unannotated(probabilities: np.ndarray, task: Task, unannotated: Sequence[str]) -> tuple[np.ndarray, Task]:
    """Probabilities ``(K, *)`` and labels that a case can be compared on: where nobody looked for a label, background
    means "none of the others". Regions that nobody looked for are left out.
    """
    channels = [task.channels[key] for key in unannotated]
    if not channels or max(channels) >= len(probabilities):
        return probabilities, task
    if task.regions:
        known = {key: values for key, values in task.labels.items() if key not in unannotated}
        return np.delete(probabilities, channels, axis=0), replace(task, labels=known)
    return as_background(probabilities, channels), task


def as_background(probabilities: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """Softmax probabilities ``(K, *)`` where background, channel 0, means "none of the labels in other channels"."""
    if not channels:
        return probabilities
    merged = probabilities.copy()
    merged[0] += merged[list(channels)].sum(0)
    merged[list(channels)] = 0
    return merged


def disagreement(probabilities: np.ndarray, prediction: np.ndarray, task: Task, file: Path) -> tuple[str, ...]:
    """A note if the probabilities ``(K, *)`` decide many voxels otherwise than the segmentation ``(*)``."""
    decided = probabilities > 0.5 if task.regions else probabilities.argmax(0)
    different, foreground = np.zeros(prediction.shape, bool), np.zeros(prediction.shape, bool)
    for key, channel in task.channels.items():
        pair = decided[channel] if task.regions else decided == channel, np.isin(prediction, task.labels[key])
        different |= pair[0] != pair[1]
        foreground |= pair[0] | pair[1]
    share = np.count_nonzero(different) / max(1, np.count_nonzero(foreground))
    if share <= DISAGREEING:
        return ()
    return (
        f"{file} decides {share:.0%} of the foreground otherwise than the segmentation: unless that was post-processed "
        "since, they are of two predictions, and the calibration is not that of the segmentation",
    )


def calibration_metrics(whole: cal.Calibration, band: cal.Calibration) -> dict[str, float]:
    """Calibration metrics of the whole image, and of the band with the ending ``_band``."""
    return whole.as_dict() | {f"{name}_band": value for name, value in band.as_dict().items()}


def case_statistics(
    probabilities: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    task: Task,
    options: Options,
) -> dict[str, tuple[cal.Calibration, cal.Calibration]]:
    """Calibration statistics of the whole image and of the band, label-wise and top-label.

    Args:
        probabilities: ``(K, *)`` with the background first, or ``(R, *)`` for regions.
        prediction: ``(*)`` label map, for the band.
        reference: ``(*)`` label map.
        spacing: voxel size in mm in the order of the axes.
        task: labels; ignored voxels count for nothing.
        options: bins and width of the band.

    Returns:
        Label key or `POOLED` -> (whole image, band).

    Raises:
        ValueError: the probabilities do not fit to the reference or to the labels.
    """
    expected = (len(task.labels) + (not task.regions), *reference.shape)
    if probabilities.shape != expected:
        raise ValueError(f"probabilities have shape {probabilities.shape}, labels and reference need {expected}")
    valid = np.ones(reference.shape, bool) if task.ignore_label is None else reference != task.ignore_label
    foreground = ((prediction != 0) | (reference != 0)) & valid
    band = foreground_band(foreground, spacing, options.band_mm)
    targets = {key: np.isin(reference, values) for key, values in task.labels.items()}
    if task.regions:
        target, top = np.stack(list(targets.values())), {"regions": True}
    else:
        target, top = np.where(valid, reference, 0), {}

    def both(function: Any, *arrays: np.ndarray, **keywords: Any) -> tuple[cal.Calibration, cal.Calibration]:
        inside, outside = (
            function(*arrays, mask=valid & part, bins=options.bins, **keywords) for part in (band, ~band)
        )
        return inside + outside, inside

    result = {POOLED: both(cal.calibration, probabilities, target, **top)}
    for key, channel in task.channels.items():
        result[key] = both(cal.label_calibration, probabilities[channel], targets[key])
    return result


def foreground_band(foreground: np.ndarray, spacing: Sequence[float], width: float) -> np.ndarray:
    """Voxels whose centre is at most ``width`` mm from that of a foreground voxel, the foreground included.

    Args:
        foreground: boolean ``(*)``.
        spacing: voxel size in mm in the order of the axes.
        width: mm.
    """
    band = np.zeros(foreground.shape, bool)
    if not foreground.any():
        return band
    box = []
    for axis, step in enumerate(spacing):
        occupied = np.flatnonzero(foreground.any(axis=tuple(a for a in range(foreground.ndim) if a != axis)))
        margin = int(min(width / step, foreground.shape[axis])) + 1
        box.append(slice(max(0, int(occupied[0]) - margin), int(occupied[-1]) + margin + 1))
    band[tuple(box)] = distance_transform_edt(~foreground[tuple(box)], sampling=spacing) <= width
    return band


def read_probabilities(file: Path) -> np.ndarray:
    """Probabilities ``(K, *)`` that nnU-Net saved with ``--save_probabilities`` or ``--npz``.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            return content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} holds no readable array 'probabilities' ({error}): predict the case again") from error


def _read_pair(case: Case, task: Task) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], tuple[str, ...]]:
    if not case.reference.is_file():
        raise FileNotFoundError(f"no reference {case.reference}")
    prediction, predicted = _read(case.prediction, task)
    reference, expected = _read(case.reference, task)
    spacing = tuple(float(s) for s in expected["spacing"])
    if prediction.shape != reference.shape or not np.allclose(predicted["spacing"], spacing, rtol=1e-3):
        raise ValueError(
            f"{case.prediction} has shape {prediction.shape} and spacing {tuple(predicted['spacing'])}, but "
            f"{case.reference} has {reference.shape} and {spacing}: they must have the same geometry"
        )
    notes = []
    for key in ("origin", "direction"):
        pair = [properties.get("sitk_stuff", {}).get(key, ()) for properties in (predicted, expected)]
        # nnU-Net too compares voxel by voxel and only warns: labels are often saved without a proper header.
        if len(pair[0]) != len(pair[1]) or not np.allclose(*pair, rtol=1e-3, atol=1e-2):
            notes.append(f"the {key} of prediction {pair[0]} and reference {pair[1]} differ; compared voxel by voxel")
    declared = {0, *(v for values in task.labels.values() for v in values)}
    for array, file in ((prediction, case.prediction), (reference, case.reference)):
        unknown = set(np.unique(array).tolist()) - declared - {task.ignore_label}
        if unknown:
            notes.append(f"{file} holds the labels {sorted(unknown)}, which dataset.json does not declare")
    return prediction, reference, spacing, tuple(notes)


def _read(file: Path, task: Task) -> tuple[np.ndarray, dict[str, Any]]:
    """Label map ``(z, y, x)`` as nnU-Net's reader orders it, and its properties."""
    try:
        array, properties = task.reader().read_seg(str(file))
    except Exception as error:  # SimpleITK, nibabel, imageio and tifffile each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(f"{file} cannot be read: {reason}") from error
    if array.ndim != 4 or array.shape[0] != 1:
        raise ValueError(f"{file} is no label map: one channel is needed, nnU-Net reads {array.shape}")
    labels = array[0].astype(np.int32)
    if not np.array_equal(labels, array[0]):
        raise ValueError(f"{file} is no label map: it holds values that are not whole numbers")
    return labels, properties
