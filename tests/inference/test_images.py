"""Maps of floats in every format that nnU-Net reads, read back by other libraries in the geometry of the image."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_diffext.inference.images import map_ending, write_map

# A patient lying the other way round, with a tilted axis order: everything that a reader might turn.
AFFINE = np.array([[0, -0.8, 0, 40], [0.7, 0, 0, -20], [0, 0, -2.5, 10], [0, 0, 0, 1]], float)


def write_image(folder: Path, array: np.ndarray) -> Path:
    """``(x, y, z)`` with AFFINE."""
    file = folder / "case_0000.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), file)
    return file


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
def test_nifti_maps_lie_on_the_image(reader: type, tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    file = write_image(tmp_path, array)
    data, properties = reader().read_images((str(file),))
    assert map_ending(reader, ".nii.gz") == ".nii.gz"
    write_map(data[0], tmp_path / "map.nii.gz", reader, properties)
    found = nibabel.load(tmp_path / "map.nii.gz")
    assert found.get_data_dtype() == np.float32
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(found.get_fdata(), array, atol=1e-7)
    # and beside nnU-Net's own segmentation
    reader().write_seg((data[0] > 0.5).astype(np.uint8), str(tmp_path / "seg.nii.gz"), properties)
    segmentation = nibabel.load(tmp_path / "seg.nii.gz")
    np.testing.assert_allclose(segmentation.affine, found.affine, atol=1e-5)
    assert np.array_equal(segmentation.get_fdata() > 0, found.get_fdata() > 0.5)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".gipl"])
def test_other_formats_of_itk(ending: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.6, 2.0))
    sitk.WriteImage(image, str(tmp_path / f"case_0000{ending}"))
    data, properties = SimpleITKIO().read_images((str(tmp_path / f"case_0000{ending}"),))
    write_map(data[0], tmp_path / f"map{map_ending(SimpleITKIO, ending)}", SimpleITKIO, properties)
    found = sitk.ReadImage(str(tmp_path / f"map{ending}"))
    assert found.GetPixelID() == sitk.sitkFloat32 and found.GetSpacing() == pytest.approx((0.5, 0.6, 2.0))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), array)


def test_2d_images_of_itk_stay_2d(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).random((6, 7)).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / "case_0000.nii.gz"))
    data, properties = SimpleITKIO().read_images((str(tmp_path / "case_0000.nii.gz"),))
    write_map(data[0], tmp_path / "map.nii.gz", SimpleITKIO, properties)
    assert sitk.ReadImage(str(tmp_path / "map.nii.gz")).GetSize() == (7, 6)


def test_3d_tiff_with_its_spacing_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    write_map(array, tmp_path / f"map{map_ending(Tiff3DIO, '.tif')}", Tiff3DIO, {"spacing": (2, 1, 1)})
    data, properties = Tiff3DIO().read_seg(str(tmp_path / "map.tif"))
    assert np.array_equal(data[0], array) and properties["spacing"] == [2, 1, 1]


@pytest.mark.parametrize(("ending", "expected"), [(".png", ".npy"), (".bmp", ".npy"), (".tif", ".tif")])
def test_natural_images(ending: str, expected: str, tmp_path: Path) -> None:
    image = (np.random.default_rng(0).random((6, 7)) * 255).astype(np.uint8)
    io.imsave(tmp_path / f"case_0000{ending}", image, check_contrast=False)
    data, properties = NaturalImage2DIO().read_images((str(tmp_path / f"case_0000{ending}"),))
    assert map_ending(NaturalImage2DIO, ending) == expected
    file = tmp_path / f"map{expected}"
    write_map(data[0] / 255, file, NaturalImage2DIO, properties)
    found = np.load(file) if expected == ".npy" else tifffile.imread(file)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image / 255, atol=1e-6)
