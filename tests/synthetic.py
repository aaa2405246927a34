"""A tiny dataset in nnU-Net's raw format that a network can learn: bright balls on a dark, noisy ellipsoid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

FILE_ENDING = ".nii.gz"


def make_raw_dataset(
    raw_dir: str | Path,
    dataset_id: int,
    name: str,
    *,
    cases: int,
    unlabeled: int = 0,
    shape: Sequence[int] = (16, 24, 24),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    labels: Mapping[str, int | Sequence[int]] | None = None,
    ignore: bool = False,
    ignored_cases: int = 0,
    zero_background: bool = False,
    modality: str = "MR",
    seed: int = 0,
) -> Path:
    """Write ``DatasetXXX_<name>`` and return its folder. The same arguments give the same voxels.

    Args:
        raw_dir: ``nnUNet_raw``.
        dataset_id: for the name of the folder.
        name: for the name of the folder.
        cases: labelled cases ``case_000``, ``case_001``, ... in ``imagesTr`` and ``labelsTr``.
        unlabeled: cases ``extra_000``, ... in ``imagesTu``; their labels are nowhere.
        shape: ``(z, y, x)``, or ``(y, x)`` for a 2D dataset.
        spacing: mm, in the order of ``shape``.
        channels: ``ch0``, ``ch1``, ...
        labels: name -> value, or list of values for regions. Default: background 0, ball 1.
        ignore: add the ignore label; a third of each labelled case carries it.
        ignored_cases: the last ones of the labelled cases carry the ignore label only.
        zero_background: exact zeros around the ellipsoid, as in skull-stripped images.
        modality: name of the channels, numbered if there are several. A single ``CT`` changes the normalisation.
        seed: of the noise and of where the balls are.
    """
    folder = Path(raw_dir) / f"Dataset{dataset_id:03d}_{name}"
    for sub in ("imagesTr", "labelsTr", *(("imagesTu",) if unlabeled else ())):
        (folder / sub).mkdir(parents=True)
    labels = dict(labels or {"background": 0, "ball": 1})
    values = sorted({v for entry in labels.values() for v in ([entry] if isinstance(entry, int) else entry)} - {0})
    ignore_value = max(values) + 1 if ignore or ignored_cases else None
    dataset_json = _dataset_json(labels, ignore_value, channels, modality, cases)
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=2))
    rng = np.random.default_rng(seed)
    for index in range(cases + unlabeled):
        image, segmentation = _case(rng, tuple(shape), channels, values, zero_background)
        labeled = index < cases
        identifier = f"case_{index:03d}" if labeled else f"extra_{index - cases:03d}"
        for c in range(channels):
            file = folder / ("imagesTr" if labeled else "imagesTu") / f"{identifier}_{c:04d}{FILE_ENDING}"
            write_image(file, image[c], spacing)
        if labeled:
            if ignore:
                segmentation[: max(1, shape[0] // 3)] = ignore_value
            if index >= cases - ignored_cases:
                segmentation[:] = ignore_value
            write_image(folder / "labelsTr" / f"{identifier}{FILE_ENDING}", segmentation, spacing)
    return folder


def _dataset_json(
    labels: Mapping[str, int | Sequence[int]], ignore_value: int | None, channels: int, modality: str, cases: int
) -> dict[str, Any]:
    entries = {name: value if isinstance(value, int) else list(value) for name, value in labels.items()}
    content: dict[str, Any] = {
        "channel_names": {str(c): modality if channels == 1 else f"{modality}{c}" for c in range(channels)},
        "labels": entries if ignore_value is None else {**entries, "ignore": ignore_value},
        "numTraining": cases,
        "file_ending": FILE_ENDING,
    }
    if any(isinstance(value, list) for value in entries.values()):
        regions = [value for value in entries.values() if value != 0]
        content["regions_class_order"] = [v if isinstance(v, int) else v[-1] for v in regions]
    return content


def write_image(file: Path, array: np.ndarray, spacing: Sequence[float], origin: Sequence[float] | None = None) -> None:
    """Write an array whose axes are in the order of ``spacing`` (slowest first; SimpleITK's is the reverse)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    if origin is not None:
        image.SetOrigin([float(o) for o in reversed(origin)])
    sitk.WriteImage(image, str(file))


def _case(
    rng: np.random.Generator, shape: tuple[int, ...], channels: int, values: Sequence[int], zero_background: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Image ``(channels, *shape)`` float32 and segmentation ``shape`` uint8: one ball per label, brighter each."""
    size = np.array(shape)
    axes = np.meshgrid(*[np.arange(s, dtype=np.float32) for s in shape], indexing="ij", sparse=True)
    body = sum(((a - s / 2) / (0.4 * s)) ** 2 for a, s in zip(axes, size, strict=True)) < 1
    segmentation = np.zeros(shape, np.uint8)
    mean = np.full(shape, 10.0) + 40.0 * body
    for value in values:
        centre = size / 2 + rng.uniform(-0.15, 0.15, len(shape)) * size
        radius = 0.22 * size.min() / (1 + 0.3 * (value - 1))
        ball = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2
        segmentation[ball] = value
        mean[ball] = 80.0 + 30.0 * value
    image = mean + rng.normal(0, 5, (channels, *shape))
    if zero_background:
        image *= body
    return image.astype(np.float32), segmentation
