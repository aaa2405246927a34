"""Two small datasets to merge: CT without an ignore label, MR with one; both know the spleen, with different values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_diffext.data.merge import MergeReport, merge_datasets
from synthetic import make_raw_dataset

CT, MR = "Dataset001_Abdomen", "Dataset002_Tumours"
CT_LABELS = {"background": 0, "liver": 1, "spleen": 2}
MR_LABELS = {"background": 0, "spleen": 1, "tumour": 2}
DIRECTION = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
SHAPE = (8, 10, 12)


def make_sources(raw: Path, **kwargs: Any) -> tuple[Path, Path]:
    """Two labelled CT cases and an unlabelled one; two labelled MR cases on a rotated grid."""
    kwargs = {"shape": SHAPE, "cases": 2, **kwargs}
    ct = make_raw_dataset(raw, 1, "Abdomen", labels=CT_LABELS, modality="CT", unlabeled=1, **kwargs)
    mr = make_raw_dataset(raw, 2, "Tumours", labels=MR_LABELS, modality="MR", ignore=True, seed=1, **kwargs)
    for file in mr.glob("*Tr/*.nii.gz"):
        change(file, _rotate)
    return ct, mr


def _rotate(image: sitk.Image) -> sitk.Image:
    if image.GetDimension() == 3:
        image.SetDirection(DIRECTION)
        image.SetOrigin((3.5, -7.25, 11))
    return image


def merge(modalities: tuple[str, ...] = ("CT", "MR"), sources: tuple[Any, ...] = (1, 2), **kwargs: Any) -> MergeReport:
    return merge_datasets(sources, modalities, 20, "All", **{"num_processes": 1, "show_progress": False, **kwargs})


def change(file: Path, edit: Callable[[sitk.Image], sitk.Image], ending: str = "") -> None:
    """Replace an image, under another ending if one is given."""
    image = edit(sitk.ReadImage(str(file)))
    target = file.with_name(file.name.split(".")[0] + ending) if ending else file
    file.unlink()
    sitk.WriteImage(image, str(target))


def set_voxel(file: Path, value: float, kind: int = sitk.sitkUInt8) -> None:
    """Write a value into one voxel."""
    image = sitk.Cast(sitk.ReadImage(str(file)), kind)
    image[0, 0, 0] = value
    sitk.WriteImage(image, str(file))


def edit_json(folder: Path, **changes: Any) -> None:
    """Change ``dataset.json``; None removes a key."""
    file = folder / "dataset.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
