"""Small folders of predictions, references and probabilities as nnU-Net leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffext.evaluation.folder import Evaluation, evaluate_predictions
from nnunet_diffext.evaluation.task import OUTPUTS

SPACING = (3.0, 1.0, 0.5)
SHAPE = (8, 14, 16)
LABELS = {"background": 0, "organ": 1, "tumour": 2}
REGIONS = {"background": 0, "whole": [1, 2], "tumour": [2]}


def write_labels(file: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> None:
    """Label map with the spacing in the order of its axes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(tuple(reversed(spacing)))
    sitk.WriteImage(image, str(file))


def reference_of(index: int) -> np.ndarray:
    """A box of label 1 with a box of label 2 in it; one voxel wider for every next case."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 3 : 9 + index % 4, 3:12] = 1
    labels[3:5, 5:8, 5:9] = 2
    return labels


def probabilities_of(labels: np.ndarray, rng: np.random.Generator, classes: int = 3) -> np.ndarray:
    """Softmax ``(classes, *)`` float32 that mostly favours these labels."""
    logits = rng.normal(size=(classes, *labels.shape)) + 3.0 * (np.arange(classes)[:, None, None, None] == labels)
    return (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)


def make_folders(
    root: Path,
    cases: int = 3,
    *,
    npz: bool = True,
    labels: Mapping[str, Any] = LABELS,
    seed: int = 0,
    name: str = "pred",
) -> tuple[Path, Path]:
    """Write ``root/name`` and ``root/gt`` with ``case_0``, ``case_1``, ...; regions are those of `REGIONS`."""
    pred, gt = root / name, root / "gt"
    pred.mkdir(parents=True)
    dataset_json: dict[str, Any] = {"labels": dict(labels), "file_ending": ".nii.gz"}
    regions = any(isinstance(value, list) for value in labels.values())
    if regions:
        dataset_json["regions_class_order"] = [1, 2]
    (pred / "dataset.json").write_text(json.dumps(dataset_json))
    rng = np.random.default_rng(seed)
    for index in range(cases):
        reference = reference_of(index)
        write_labels(gt / f"case_{index}.nii.gz", reference)
        p = probabilities_of(reference, rng)
        prediction = p.argmax(0)
        if regions:
            p = np.stack([p[1] + p[2], p[2]])
            prediction = np.where(p[1] > 0.5, 2, np.where(p[0] > 0.5, 1, 0))
        write_labels(pred / f"case_{index}.nii.gz", prediction)
        if npz:
            np.savez_compressed(pred / f"case_{index}.npz", probabilities=p)
    return pred, gt


def evaluate(pred: Path, gt: Path, **keywords: Any) -> Evaluation:
    """In this process."""
    return evaluate_predictions(pred, gt, num_processes=1, **keywords)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary_diffext.json, which must be strict JSON."""
    return json.loads((folder / OUTPUTS[0]).read_text(), parse_constant=pytest.fail)
