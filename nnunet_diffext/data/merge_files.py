"""Puts the files of one case into the merged dataset: linked, copied or converted images, labels with new values."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

CONVERTIBLE = (".nii", *SimpleITKIO.supported_file_endings)
CONVERTED_TO = ".nii.gz"


@dataclass(frozen=True)
class Place:
    """Where files go, and how.

    Attributes:
        folder: that is filled now.
        final: its name later, in the same parent folder.
        ending: of all files of the merged dataset; files with another one are converted.
        reader: nnU-Net's reader and writer of label files with that ending.
        copy: copy files instead of linking them.
    """

    folder: Path
    final: Path
    ending: str
    reader: type[BaseReaderWriter]
    copy: bool


def place_images(place: Place, subfolder: str, case: str, files: tuple[str, ...]) -> None:
    """Put the channels of a case into a subfolder as ``{CASE}_{XXXX}{ending}``."""
    for channel, file in enumerate(files):
        _place(place, file, Path(subfolder) / f"{case}_{channel:04d}{place.ending}")


def place_labeled(
    place: Place, part: str, case: str, files: tuple[str, ...], label: str, values: Mapping[int, int]
) -> list[int | float]:
    """Put a labelled case into ``images{part}`` and ``labels{part}``. Its label file is always read, also if it is only
    linked: a value that its dataset does not know may be a class of another one.

    Args:
        place: where.
        part: ``Tr`` or ``Ts``.
        case: its new id.
        files: images.
        label: label file.
        values: value in it -> new value.

    Returns:
        Values in the file that ``values`` does not have; then nothing is placed.
    """
    converted = not label.endswith(place.ending)
    io = (SimpleITKIO if converted else place.reader)()
    segmentation, properties = io.read_seg(label)
    found = [float(value) for value in np.unique(segmentation)]
    unknown = [int(value) if value.is_integer() else value for value in found if value not in values]
    if unknown:
        return unknown
    place_images(place, f"images{part}", case, files)
    target = Path(f"labels{part}") / f"{case}{place.ending}"
    if all(values[int(value)] == value for value in found):
        _place(place, label, target)
    else:
        table = np.zeros(max(values) + 1, np.uint16)
        table[list(values)] = list(values.values())
        # nnU-Net's writers take the smallest integer type that holds the values.
        io.write_seg(table[segmentation[0].astype(np.int64)], str(place.folder / target), properties)
    return []


def _place(place: Place, file: str, target: Path) -> None:
    path = place.folder / target
    if not file.endswith(place.ending):
        sitk.WriteImage(sitk.ReadImage(file), str(path), True)
    elif place.copy:
        shutil.copyfile(file, path)
    else:
        _link(Path(os.path.abspath(file)), path, Path(os.path.abspath(place.final)))


def _link(file: Path, path: Path, dataset: Path) -> None:
    # Relative inside nnUNet_raw, which can then be moved as a whole; what lies elsewhere is not moved with it.
    inside = file.is_relative_to(dataset.parent)
    try:
        path.symlink_to(os.path.relpath(file, dataset / path.parent.name) if inside else file)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot make a link to {file} ({reason}); copy the files with --copy") from error
