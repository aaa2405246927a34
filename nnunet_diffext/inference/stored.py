"""Probabilities and references of many cases in temporary files: measured at several temperatures, kept out of memory.

Log-probabilities are stored in half precision, which keeps p and 1 - p to 1 % wherever they are between 1e-9 and 1.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def bytes_per_voxel(channels: int, regions: bool) -> int:
    """What :class:`StoredCase` takes: two bytes per probability, the reference and the mask."""
    return 2 * channels + (channels if regions else 2) + 1


def require_space(needed: int) -> None:
    """Raise ``ValueError`` unless the temporary folder has so many bytes free."""
    try:
        free = shutil.disk_usage(tempfile.gettempdir()).free
    except OSError as error:
        raise no_space(error) from error
    if free < needed:
        raise no_space(f"the cases take {needed / 2**30:.1f} GB, {free / 2**30:.1f} GB are free")


def no_space(reason: object) -> ValueError:
    """The error of a temporary folder that cannot be used, with the way out."""
    try:
        folder = tempfile.gettempdir()
    except OSError:  # no folder can be written to
        folder = ""
    return ValueError(
        f"The temporary folder {folder} is too small ({reason}). Free space there, or set TMPDIR to "
        "a folder on another disk."
    )


class StoredCase:
    """Probabilities ``(K, *)``, reference (``(*)`` classes, ``(K, *)`` 0 and 1 for regions) and mask ``(*)`` of a case.

    Raises:
        ValueError: the disk is full.
    """

    def __init__(
        self, folder: Path, name: str, probabilities: np.ndarray, reference: np.ndarray, mask: np.ndarray
    ) -> None:
        self.regions = reference.ndim == probabilities.ndim
        self._files = [folder / f"{len(list(folder.iterdir()))}_{part}.npy" for part in ("p", "y", "mask")]
        self.name = name
        with np.errstate(divide="ignore"):
            logarithm = np.log(probabilities).astype(np.float16)
        small = np.uint8 if self.regions else np.int16
        self._write(zip(self._files, (logarithm, reference.astype(small), mask), strict=True))

    def _write(self, contents: Iterable[tuple[Path, np.ndarray]]) -> None:
        try:
            for file, array in contents:
                np.save(file, array)
        except OSError as error:
            raise no_space(error.strerror or error) from error

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float32 probabilities, integer reference and mask."""
        logarithm, reference, mask = map(np.load, self._files)
        p = np.exp(logarithm.astype(np.float32))
        return p if self.regions else p / p.sum(0, keepdims=True), reference.astype(np.int64), mask
