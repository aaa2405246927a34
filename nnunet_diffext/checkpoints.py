"""Checkpoint files: written atomically, read without running code that a malicious file may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_diffext.files import replacing


class CheckpointError(ValueError):
    """A checkpoint could not be read or written; the message names the file and what to do."""


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write beside ``path``, flush to disk, then rename: a kill at any moment leaves a whole file.

    Raises:
        CheckpointError: if the disk is full or the folder not writable; an older file at ``path`` is untouched.
    """
    path = Path(path)
    try:
        with replacing(path, f".incomplete{path.suffix}") as file:  # the next write replaces what a killed run left
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        kept = "The previous version is still in place." if path.exists() else "No older version exists."
        raise CheckpointError(
            f"Could not write {path}: {error}. Free disk space or check permissions. {kept}"
        ) from error


def read_safely(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint of nnU-Net or of this package: tensors, plain types and NumPy scalars, nothing that executes.

    Raises:
        CheckpointError: if the file is missing, damaged or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}.")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than plain data; it was not loaded, because that could run code: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}). Use another checkpoint of this folder."
        ) from error


def _numpy_globals() -> list[Any]:
    """What nnU-Net's logging stores: NumPy scalars and their dtypes."""
    scalar = np.float64(0).__reduce__()[0]
    names = ("Float64DType", "Float32DType", "Float16DType", "Int64DType", "Int32DType", "BoolDType")
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *(getattr(np.dtypes, n) for n in names)]
