"""Image, reference, prediction and uncertainty of one case, as arrays on one grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_diffext.data.dataset import load_json, nnunet_folder
from nnunet_diffext.evaluation.task import Task
from nnunet_diffext.files import UNCERTAINTY
from nnunet_diffext.report.model import ReportedModel


class NoPictureError(ValueError):
    """The case cannot be drawn; the message says why."""


@dataclass(frozen=True)
class CaseImages:
    """Arrays ``(z, y, x)`` in the axis order of the dataset's reader.

    Attributes:
        image: first channel.
        reference: labels.
        prediction: labels.
        entropy: in [0, 1], or ``None``.
        spacing: mm per axis; 2D images have a made-up first one.
        note: why there is no uncertainty although there is a file, or empty.
    """

    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    entropy: np.ndarray | None
    spacing: tuple[float, ...]
    note: str = ""


def load_case(model: ReportedModel, row: Mapping[str, Any], predictions: Path) -> CaseImages:
    """Read everything that there is about a scored case.

    Args:
        model: labels, reader, dataset.
        row: of ``metric_per_case``.
        predictions: folder that may hold ``uncertainty/CASE_entropy.*``.

    Raises:
        NoPictureError: the image is missing, a file cannot be read, or the shapes differ.
    """
    task, case = model.task, row["case"]
    image, spacing = _read(task, find_image(model, case), "image")
    prediction, _ = _read(task, predictions / (case + task.file_ending), "label")
    reference, _ = _read(task, Path(row["reference_file"]), "label")
    if not image.shape == prediction.shape == reference.shape:
        raise NoPictureError(
            f"the image has shape {image.shape}, the prediction {prediction.shape} and the reference {reference.shape}"
        )
    entropy, note = None, ""
    file = next(iter(sorted((predictions / UNCERTAINTY).glob(_literal(f"{case}_entropy.") + "*"))), None)
    if file is not None:
        try:
            entropy = _read_map(task, file).reshape(image.shape)
        except ValueError as error:
            note = f"The uncertainty map cannot be used: {error}"
    return CaseImages(image, reference, prediction, entropy, spacing, note)


def find_image(model: ReportedModel, case: str) -> Path:
    """First channel of a case in ``nnUNet_raw``.

    Raises:
        NoPictureError: it is not there.
    """
    try:
        raw = nnunet_folder("nnUNet_raw") / model.dataset
    except ValueError as error:
        raise NoPictureError(str(error)) from error
    files = [raw / name / f"{case}_0000{model.task.file_ending}" for name in ("imagesTr", "imagesTs", "imagesVal")]
    try:
        # nnU-Net also takes datasets whose dataset.json lists the files.
        listed = load_json(raw / "dataset.json", "").get("dataset", {})[case]["images"][0]
        files.insert(0, raw / listed)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError):
        pass
    for file in files:
        if file.is_file():
            return file
    raise NoPictureError(f"its image {files[-3].name} is not in {model.dataset} of nnUNet_raw")


def _read(task: Task, file: Path, kind: str) -> tuple[np.ndarray, tuple[float, ...]]:
    try:
        reader = task.reader()
        array, properties = reader.read_seg(str(file)) if kind == "label" else reader.read_images((str(file),))
    except Exception as error:  # SimpleITK, nibabel, imageio and tifffile each have their own
        raise NoPictureError(f"{file.name} cannot be read: {str(error).strip().splitlines()[-1:]}") from error
    return np.asarray(array[0]), tuple(float(s) for s in properties["spacing"])


def _read_map(task: Task, file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    return _read(task, file, "image")[0]


def _literal(name: str) -> str:
    """For ``glob``: brackets and stars in the name of a case mean themselves."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)
