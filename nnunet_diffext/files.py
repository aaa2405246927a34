"""Writing files such that a kill, a full disk or a reader at the wrong moment never meets half of one; and the names of
those that one part of the package writes and another one reads."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FINAL = "checkpoint_final.pth"
"""nnU-Net's name for the checkpoint of a finished fold."""
CALIBRATION = "calibration.json"
"""In a model folder, by ``nnunet_diffext calibrate``."""
RECONSTRUCTION = "reconstruction.json"
"""In the validation folder of a training that segments nothing but reconstructs, by its trainer."""
QUALITY, UNCERTAINTY = "quality.csv", "uncertainty"
"""Scores and folder of maps in a folder of predictions, by ``nnunet_diffext predict``."""


@contextlib.contextmanager
def replacing(path: Path, temporary: str | None = None) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write to; it is flushed to disk and takes its place when the block ends well.

    Args:
        path: an older file there is untouched until then, and stays if the block fails.
        temporary: name of the file beside; by default one that no other process uses.
    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    beside = path.with_name(temporary or f".{path.name}.{os.getpid()}.incomplete")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file by ``content`` (text as UTF-8) in one step, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill; it takes its place when the block ends well, and vanishes if it fails.

    Its name starts with a dot, so nnU-Net does not see it; it is as deep as ``path``, so relative links stay right.

    Raises:
        OSError: ``path`` exists and is not empty, or the folder is not writable.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    shutil.rmtree(beside, ignore_errors=True)  # of a killed process that had our number
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
