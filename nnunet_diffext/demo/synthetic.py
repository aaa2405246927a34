"""Synthetic abdominal volumes: organs of different size and contrast, a lesion in one of them, artefacts of a scanner.

Every case is drawn from its own seed, so the first cases stay the same when more are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "lesion": 4}
FILE_ENDING = ".nii.gz"
SHAPE = (16, 48, 48)
SLICE_DISTANCE_MM = 3.6


@dataclass(frozen=True)
class Ellipsoid:
    """A part of the phantom. Centre and radii in mm along (z, y, x), from the middle of the volume."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    intensity: float
    label: int = 0


# Painted in this order, later ones on top. The first four and the bowel (see _parts) have no label: they are what a
# network trained on few cases confuses with the organs. A radius of 1000 mm runs through the whole volume.
PHANTOM = (
    Ellipsoid((0, 0, 0), (1000, 33, 37), 80),  # soft tissue
    Ellipsoid((0, 26, 0), (1000, 6, 6), 185),  # vertebra
    Ellipsoid((0, 16, 3), (1000, 3.5, 3.5), 170),  # aorta
    Ellipsoid((0, 16, -4), (1000, 3, 4), 125),  # vein
    Ellipsoid((-3, 17, -17), (18, 9, 8), 160, LABELS["kidneys"]),
    Ellipsoid((3, 17, 17), (18, 9, 8), 160, LABELS["kidneys"]),
    Ellipsoid((4, -3, 23), (19, 14, 9), 105, LABELS["spleen"]),
    Ellipsoid((0, -7, -13), (22, 16, 17), 130, LABELS["liver"]),
)


def _parts(rng: np.random.Generator) -> list[Ellipsoid]:
    """The phantom of one patient: every part moved, scaled and of another contrast, bowel and a lesion added."""
    parts = []
    for part in PHANTOM:
        centre = tuple(c + rng.normal(0, 2) for c in part.centre)
        radii = tuple(r * rng.uniform(0.85, 1.15) for r in part.radii)
        parts.append(Ellipsoid(centre, radii, part.intensity + rng.normal(0, 6), part.label))
    for _ in range(4):
        centre = (rng.uniform(-25, 25), rng.uniform(-18, 6), rng.uniform(0, 14))
        radii = tuple(rng.uniform(3, 7, size=3))
        parts.insert(1, Ellipsoid(centre, radii, rng.uniform(90, 160)))
    liver = parts[-1]
    direction = rng.normal(size=3)
    direction *= rng.uniform(0.1, 0.45) / np.linalg.norm(direction)
    centre = tuple(c + d * r for c, d, r in zip(liver.centre, direction, liver.radii, strict=True))
    radii = tuple(rng.uniform(6, 8) * rng.uniform(0.9, 1.1, size=3))
    parts.append(Ellipsoid(centre, radii, liver.intensity - rng.uniform(45, 60), LABELS["lesion"]))
    return parts


def _smooth_field(rng: np.random.Generator, spacing: tuple[float, ...], scale_mm: float) -> np.ndarray:
    """Random field with values in [-1, 1] that varies over ``scale_mm``."""
    field = gaussian_filter(rng.normal(size=SHAPE), [scale_mm / s for s in spacing])
    return field / np.abs(field).max()


def make_case(seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """One volume.

    Args:
        seed: any integers; the same ones give the same volume.

    Returns:
        Image (int16, `SHAPE`), labels (uint8, `SHAPE`, values of `LABELS`) and the spacing in mm along (z, y, x), which
        differs between cases within the plane.
    """
    rng = np.random.default_rng(seed)
    in_plane = rng.uniform(1.6, 1.75)
    spacing = (SLICE_DISTANCE_MM, in_plane, in_plane)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, spacing, strict=True)]
    position = np.meshgrid(*axes, indexing="ij")
    # Bends the organs by up to 4 mm: they are not ellipsoids any more.
    position = [p + 4 * _smooth_field(rng, spacing, 12) for p in position]
    image = np.zeros(SHAPE)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    for part in _parts(rng):
        distance = sum(((p - c) / r) ** 2 for p, c, r in zip(position, part.centre, part.radii, strict=True))
        inside = distance <= 1
        if part.label == LABELS["lesion"]:
            inside &= labels == LABELS["liver"]
        image[inside], labels[inside] = part.intensity, part.label
    image = gaussian_filter(image, (0.3, 0.7, 0.7))  # partial volume
    image *= np.exp(0.25 * _smooth_field(rng, spacing, 25)) * rng.uniform(0.85, 1.15)  # bias field, gain
    image += rng.normal(0, 9, size=SHAPE)
    return np.round(image).astype(np.int16), labels, spacing


def _write(array: np.ndarray, spacing: tuple[float, ...], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing)))
    sitk.WriteImage(image, str(path))


def write_dataset(folder: Path, labeled: int, unlabeled: int, test: int, seed: int = 0) -> None:
    """Write a raw nnU-Net dataset with unlabelled cases (imagesTu) and labelled test cases (imagesTs, labelsTs).

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``; made.
        labeled: cases train_000 ...
        unlabeled: cases unlabeled_000 ... No label of them is written.
        test: cases test_000 ...
        seed: of the whole dataset.
    """
    groups = (("train", "Tr", labeled, True), ("unlabeled", "Tu", unlabeled, False), ("test", "Ts", test, True))
    for number, (prefix, suffix, count, with_labels) in enumerate(groups):
        (folder / f"images{suffix}").mkdir(parents=True, exist_ok=True)
        if with_labels:
            (folder / f"labels{suffix}").mkdir(exist_ok=True)
        for index in range(count):
            image, labels, spacing = make_case((seed, number, index))
            case = f"{prefix}_{index:03d}"
            _write(image, spacing, folder / f"images{suffix}" / f"{case}_0000{FILE_ENDING}")
            if with_labels:
                _write(labels, spacing, folder / f"labels{suffix}" / f"{case}{FILE_ENDING}")
    description = {
        "channel_names": {"0": "synthetic"},
        "labels": LABELS,
        "numTraining": labeled,
        "file_ending": FILE_ENDING,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
