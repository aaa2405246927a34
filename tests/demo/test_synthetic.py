"""The demo's data: reproducible, complete, and honest about what has no label."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation

from nnunet_diffext.demo.synthetic import LABELS, SHAPE, make_case, write_dataset


@pytest.fixture(scope="module")
def cases():
    return [make_case((0, 0, index)) for index in range(8)]


def test_same_seed_same_volume_other_seed_other_volume(cases):
    image, labels, spacing = make_case((0, 0, 3))
    assert np.array_equal(image, cases[3][0]) and np.array_equal(labels, cases[3][1]) and spacing == cases[3][2]
    assert not np.array_equal(image, make_case((1, 0, 3))[0])


def test_every_label_is_in_every_case_and_the_sizes_differ(cases):
    for image, labels, _ in cases:
        assert image.shape == labels.shape == SHAPE
        sizes = {name: np.count_nonzero(labels == value) for name, value in LABELS.items()}
        assert min(sizes.values()) > 10
        assert sizes["liver"] > 1.5 * sizes["spleen"] and sizes["lesion"] < sizes["spleen"] / 2


def test_lesion_lies_in_the_liver_and_is_darker(cases):
    for image, labels, _ in cases:
        lesion = labels == LABELS["lesion"]
        around = binary_dilation(lesion, iterations=2) & ~lesion
        assert np.mean(labels[around] == LABELS["liver"]) > 0.6
        assert image[lesion].mean() < image[labels == LABELS["liver"]].mean() - 10


def test_spacing_is_anisotropic_and_varies(cases):
    assert all(s[0] / s[1] > 2 for _, _, s in cases)
    assert len({s for _, _, s in cases}) == len(cases)


def test_dataset_folder(tmp_path):
    write_dataset(tmp_path, labeled=2, unlabeled=3, test=1, seed=4)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "dataset.json",
        "imagesTr/train_000_0000.nii.gz",
        "imagesTr/train_001_0000.nii.gz",
        "imagesTs/test_000_0000.nii.gz",
        "imagesTu/unlabeled_000_0000.nii.gz",
        "imagesTu/unlabeled_001_0000.nii.gz",
        "imagesTu/unlabeled_002_0000.nii.gz",
        "labelsTr/train_000.nii.gz",
        "labelsTr/train_001.nii.gz",
        "labelsTs/test_000.nii.gz",
    ]
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["numTraining"] == 2 and description["labels"] == LABELS
    image = sitk.ReadImage(str(tmp_path / "imagesTr/train_001_0000.nii.gz"))
    expected, _, spacing = make_case((4, 0, 1))
    assert np.array_equal(sitk.GetArrayFromImage(image), expected)
    assert image.GetSpacing() == pytest.approx(spacing[::-1])


def test_more_cases_keep_the_first_ones(tmp_path):
    for folder, count in (("a", 1), ("b", 2)):
        write_dataset(tmp_path / folder, labeled=count, unlabeled=count, test=count)
    for name in ("imagesTr/train_000_0000", "imagesTu/unlabeled_000_0000", "imagesTs/test_000_0000"):
        a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f / f"{name}.nii.gz"))) for f in "ab")
        assert np.array_equal(a, b)
