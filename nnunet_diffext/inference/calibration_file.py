"""``calibration.json`` of a model folder: the temperature, and what it was fitted for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffext.data.dataset import load_json
from nnunet_diffext.files import CALIBRATION, write_atomically

COMPARED = ("folds", "checkpoint", "mirroring", "step_size", "samples", "steps", "sampler")
"""Settings that change probabilities; another seed draws from the same distribution."""


def read_calibration(model_folder: Path) -> dict[str, Any] | None:
    """Content of the file, or ``None`` without one.

    Raises:
        ValueError: damaged, or its temperature is no positive number.
    """
    file = model_folder / CALIBRATION
    if not file.is_file():
        return None
    content = load_json(file, "")
    temperature = content.get("temperature") if isinstance(content, dict) else None
    usable = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not usable or not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"{file}: 'temperature' must be a positive number, but is {temperature!r}. Fit it again with "
            "nnunet_diffext calibrate, remove it with --remove, or ignore it with predict --no_temperature."
        )
    return content


def stored_temperature(model_folder: Path) -> float:
    """The fitted temperature, or 1 without one.

    Raises:
        ValueError: see :func:`read_calibration`.
    """
    content = read_calibration(model_folder)
    return 1.0 if content is None else float(content["temperature"])


def fingerprints(model_folder: Path, folds: Sequence[int | str], checkpoint: str) -> dict[str, str]:
    """Fold -> SHA-256 of its checkpoint file: a temperature belongs to weights, not to a folder."""
    found = {}
    for fold in folds:
        digest = hashlib.sha256()
        with open(model_folder / f"fold_{fold}" / checkpoint, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[str(fold)] = digest.hexdigest()
    return found


def check_writable(model_folder: Path) -> None:
    """Before hours of work: whether the file can be written.

    Raises:
        ValueError: it cannot, with the way out.
    """
    file = model_folder / CALIBRATION
    try:
        if file.is_dir():
            raise IsADirectoryError(f"there is a folder {file}")
        probe = model_folder / f".{CALIBRATION}.{os.getpid()}.incomplete"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_written(file, error) from error


def write_calibration(model_folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the file in one step and return its path.

    Raises:
        ValueError: it cannot be written, with the way out.
    """
    file = model_folder / CALIBRATION
    try:
        write_atomically(file, json.dumps(content, indent=2))
    except OSError as error:
        raise _not_written(file, error) from error
    return file


def _not_written(file: Path, error: OSError) -> ValueError:
    return ValueError(
        f"Cannot write {file} ({error.strerror or error}). Make room and the folder writable, or only print the "
        "figures: --dry_run."
    )


def remove_calibration(model_folder: Path) -> bool:
    """Delete the file; whether there was one."""
    file = model_folder / CALIBRATION
    existed = file.is_file()
    if existed:
        file.unlink()
    return existed


def describe_use(
    content: Mapping[str, Any] | None, model_folder: Path, settings: Mapping[str, Any], modality: str | None = None
) -> list[str]:
    """What the user has to know when a prediction with these settings uses the calibration: one line, and warnings.

    Args:
        content: of the file.
        model_folder: that it is in.
        settings: of the prediction.
        modality: that the network is told.
    """
    if content is None:
        return []
    when = f", fitted {content['date']}" if "date" in content else ""
    lines = [
        f"Temperature {content['temperature']:.4g} ({model_folder / CALIBRATION}{when}) is applied to all "
        "probabilities; --no_temperature switches it off."
    ]
    fitted = content.get("settings", {})
    here = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differing = [key for key in COMPARED if key in fitted and _comparable(fitted, key) != _comparable(here, key)]
    if differing:
        pairs = ", ".join(f"{key} {_show(fitted[key])} (now {_show(here[key])})" for key in differing)
        lines.append(f"WARNING: the temperature was fitted with other settings: {pairs}. Calibrate again for these.")
    known = content.get("weights", {})
    common = [fold for fold in map(str, here["folds"]) if fold in known]
    current = fingerprints(model_folder, common, here["checkpoint"]) if "checkpoint" not in differing else {}
    changed = [fold for fold in current if current[fold] != known[fold]]
    if changed:
        lines.append(
            f"WARNING: fold {', '.join(changed)} was trained again since the temperature was fitted. Calibrate again."
        )
    if modality:
        lines.append(
            f"NOTE: the temperature was fitted without telling the network the modality; for {modality}, given, "
            "another one may be better."
        )
    if len(here["folds"]) > 1:
        lines.append(
            f"NOTE: the temperature was fitted on single folds; the mean of {len(here['folds'])} folds is less "
            "confident than one of them, so the calibrated probabilities may be too modest."
        )
    return lines


def _comparable(settings: Mapping[str, Any], key: str) -> Any:
    if key == "folds":
        return sorted(map(str, settings[key]))
    if key in ("steps", "sampler") and not settings.get("samples"):
        return None  # without samples they change nothing
    return settings[key]


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
