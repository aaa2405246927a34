"""Writing maps of floats beside nnU-Net's segmentations, in the geometry of the image that was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.orientations import io_orientation, ornt_transform
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

_TIFF = (".tif", ".tiff")


def map_ending(reader: type[BaseReaderWriter], file_ending: str) -> str:
    """File ending of maps: that of the dataset where the format holds floats, else ``.npy`` (PNG, BMP, an unknown
    reader)."""
    if issubclass(reader, (SimpleITKIO, NibabelIO, NibabelIOWithReorient, Tiff3DIO)):
        return file_ending
    if issubclass(reader, NaturalImage2DIO) and file_ending.lower() in _TIFF:
        return file_ending
    return ".npy"


def write_map(array: np.ndarray, file: Path, reader: type[BaseReaderWriter], properties: dict[str, Any]) -> None:
    """Write ``(z, y, x)``, in the axis order of the reader's arrays, as float32.

    Args:
        array: the map.
        file: ends in :func:`map_ending`. ``.npy`` files hold the array as it is, 2D images without their first axis.
        reader: of the dataset.
        properties: what the reader said about the image.
    """
    array = np.ascontiguousarray(array, dtype=np.float32)
    if issubclass(reader, SimpleITKIO):
        _write_itk(array, file, properties["sitk_stuff"])
    elif issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        _write_nibabel(array, file, properties["nibabel_stuff"])
    elif issubclass(reader, Tiff3DIO):
        tifffile.imwrite(file, data=array, compression="zlib")
        spacing = [float(s) for s in properties["spacing"]]
        file.with_suffix(".json").write_text(json.dumps({"spacing": spacing}), encoding="utf-8")
    elif file.suffix.lower() in _TIFF:
        tifffile.imwrite(file, data=array[0], compression="zlib")
    else:
        np.save(file, array[0] if array.shape[0] == 1 else array)


def _write_itk(array: np.ndarray, file: Path, geometry: dict[str, Any]) -> None:
    image = sitk.GetImageFromArray(array[0] if len(geometry["spacing"]) == 2 else array)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    if "original_orientation" in geometry:
        image = sitk.DICOMOrient(image, geometry["original_orientation"])
    sitk.WriteImage(image, str(file), True)


def _write_nibabel(array: np.ndarray, file: Path, geometry: dict[str, Any]) -> None:
    original = geometry["original_affine"]
    read = geometry.get("reoriented_affine", original)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine=read)
    nibabel.save(image.as_reoriented(ornt_transform(io_orientation(read), io_orientation(original))), file)
