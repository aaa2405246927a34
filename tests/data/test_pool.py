from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffext.data.pool import (
    EveryVoxel,
    NoClassLocations,
    UnlabeledDataset,
    entirely_ignored,
    find_unlabeled,
)
from nnunet_diffext.data.splits import Split
from nnunet_diffext.data.transforms import TwoViews
from nnunet_diffext.data.unlabeled import preprocess_unlabeled

PATCH = (8, 16, 16)
IDENTIFIER = "nnUNetPlans_3d_fullres"
IDS = [f"case_{i:03d}" for i in range(7)]
NO_IGNORE = LabelManager({"background": 0, "ball": 1}, None)


def batches(dataset, label_manager, count: int = 3, transforms=None, patch=PATCH, seed: int = 0) -> list[dict]:
    """Batches of nnU-Net's own loader; warnings are errors."""
    loader = nnUNetDataLoader(dataset, 2, patch, patch, label_manager, 0.0, transforms=transforms)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [loader.generate_train_batch() for _ in range(count)]


def augmentation() -> TwoViews:
    transforms = nnUNetTrainer.get_training_transforms(PATCH, (-0.5, 0.5), None, (0, 1, 2), False, [True, True])
    for t in transforms.transforms:
        if hasattr(t, "transform") and hasattr(t.transform, "benchmark"):
            t.transform.benchmark = False  # chooses between two kernels by their run time
    return TwoViews(transforms)


def test_load_case(tiny) -> None:
    dataset = UnlabeledDataset({"case_001": tiny.labeled_dir})
    assert isinstance(dataset, nnUNetBaseDataset)
    stock, stock_seg, _, _ = nnUNetDatasetBlosc2(str(tiny.labeled_dir), ["case_001"]).load_case("case_001")
    data, seg, previous, properties = dataset.load_case("case_001")
    np.testing.assert_array_equal(data[:], stock[:])
    assert data[:].any() and stock_seg[:].any()
    assert seg.shape == stock_seg.shape and not seg.any() and np.issubdtype(seg.dtype, np.integer)
    assert set(seg.strides) == {0}  # one element in all
    assert previous is None and dict(properties["class_locations"]) == {}


@pytest.mark.parametrize("bbox", [[[0, 4], [1, 5], [2, 6]], [[-2, 4], [20, 40], [0, 3]], [[50, 54], [0, 4], [0, 4]]])
def test_zero_segmentation_is_cropped_like_any_other(tiny, bbox) -> None:
    _, seg, _, _ = UnlabeledDataset({"case_001": tiny.labeled_dir}).load_case("case_001")
    found = crop_and_pad_nd(seg, bbox, -1, cast_cropped_to=np.int16)
    np.testing.assert_array_equal(
        found, crop_and_pad_nd(np.zeros(seg.shape, np.int8), bbox, -1, cast_cropped_to=np.int16)
    )
    # A patch is the loader's to write into, without a trace in the next one.
    found[:] = 7
    assert not seg.any() and found.flags.writeable


@pytest.mark.parametrize("ignore", [True, False])
def test_batches_do_not_depend_on_labels(tiny, ignore) -> None:
    label_manager = tiny.label_manager if ignore else NO_IGNORE
    cases = dict.fromkeys(IDS[2:5], tiny.labeled_dir)

    def draw() -> list[dict]:
        return batches(UnlabeledDataset(cases), label_manager, transforms=augmentation())

    before = draw()
    assert before[0]["data"].shape == (2, 4, *PATCH) and before[0]["data"].std() > 0
    rng = np.random.default_rng(0)
    for identifier in cases:
        garbage = rng.integers(-1, 9, size=(1, 3, 4, 5)).astype(np.int16)
        (tiny.labeled_dir / f"{identifier}_seg.b2nd").unlink()
        blosc2.asarray(garbage, urlpath=str(tiny.labeled_dir / f"{identifier}_seg.b2nd"))
        (tiny.labeled_dir / f"{identifier}.pkl").write_bytes(pickle.dumps({"class_locations": {1: garbage}}))
    replaced = draw()
    for identifier in cases:
        (tiny.labeled_dir / f"{identifier}_seg.b2nd").unlink()
        (tiny.labeled_dir / f"{identifier}.pkl").unlink()
    deleted = draw()
    for other in (replaced, deleted):
        for a, b in zip(before, other, strict=True):
            assert torch.equal(a["data"], b["data"]) and torch.equal(a["target"], b["target"])
            assert list(a["keys"]) == list(b["keys"])
    for batch in before:
        assert not batch["target"].any()


@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("patch", [PATCH, (16, 16)])
def test_patches_come_from_everywhere(tiny, ignore, patch) -> None:
    folder = tiny.preprocessed / ("nnUNetPlans_2d" if len(patch) == 2 else IDENTIFIER)
    drawn = batches(UnlabeledDataset({"case_001": folder}), tiny.label_manager if ignore else NO_IGNORE, 8, patch=patch)
    corners = {float(item[(0, *[0] * len(patch))]) for batch in drawn for item in batch["data"]}
    assert drawn[0]["data"].shape == (2, 2, *patch)
    assert len(corners - {0.0}) > 1


def test_every_voxel_lists_coordinates_as_nnunet_does() -> None:
    voxels = EveryVoxel((2, 3, 4))
    expected = np.argwhere(np.ones((1, 2, 3, 4)))
    assert len(voxels) == len(expected)
    np.testing.assert_array_equal([voxels[i] for i in range(len(voxels))], expected)
    assert len(EveryVoxel((4000, 4000, 4000))) == 4000**3


def test_no_class_is_located_anywhere() -> None:
    locations = pickle.loads(pickle.dumps(NoClassLocations((2, 3, 4))))
    assert len(locations[(-1, 0, 1, 2)]) == 24 and list(locations) == []
    for key in (1, (1, 2), ()):
        with pytest.raises(KeyError):
            locations[key]


def test_pickles_with_the_loader(tiny) -> None:
    dataset = UnlabeledDataset(dict.fromkeys(IDS[:2], tiny.labeled_dir))
    loader = nnUNetDataLoader(dataset, 2, PATCH, PATCH, tiny.label_manager, 0.0, transforms=augmentation())
    copy = pickle.loads(pickle.dumps(loader))
    results = []
    for each in (loader, copy):
        np.random.seed(3)
        torch.manual_seed(3)
        results.append(each.generate_train_batch()["data"])
    assert torch.equal(*results)


def test_older_storage_formats(tiny, tmp_path) -> None:
    data = blosc2.open(str(tiny.labeled_dir / "case_001.b2nd"))[:]
    seg = np.ones((1, *data.shape[1:]), np.int8)
    np.savez_compressed(tmp_path / "packed.npz", data=data, seg=seg)
    np.savez_compressed(tmp_path / "unpacked.npz", data=data[::-1], seg=seg)
    np.save(tmp_path / "unpacked.npy", data)
    (tmp_path / "unpacked_seg.npy").write_bytes(b"not an array")
    dataset = UnlabeledDataset({"packed": tmp_path, "unpacked": tmp_path, "case_001": tiny.labeled_dir})
    for identifier in dataset.identifiers:
        found, found_seg, _, _ = dataset.load_case(identifier)
        np.testing.assert_array_equal(found[:], data)
        assert not found_seg.any()
    split = Split((), (), ("packed", "unpacked"))
    assert set(find_unlabeled(tmp_path.parent, tmp_path.name, split, 0).cases) == {"packed", "unpacked"}


def test_cascade_adds_the_previous_segmentation(tiny, tmp_path) -> None:
    for identifier in IDS[:2]:
        shape = blosc2.open(str(tiny.labeled_dir / f"{identifier}.b2nd")).shape[1:]
        nnUNetDatasetBlosc2.save_seg(np.ones(shape, np.int8), str(tmp_path / identifier))
    pool = find_unlabeled(tiny.preprocessed, IDENTIFIER, Split((), (), tuple(IDS[:3])), 0, cascade_folder=tmp_path)
    assert list(pool.cases) == IDS[:2] and pool.without_previous_stage == (IDS[2],)
    batch = batches(UnlabeledDataset(pool.cases, tmp_path), NO_IGNORE, 1, patch=(4, 4, 4))[0]
    assert batch["target"].shape == (2, 2, 4, 4, 4)
    assert not (batch["target"][:, 0] > 0).any() and (batch["target"][:, 1] == 1).any()


def test_empty_and_vanished(tiny) -> None:
    with pytest.raises(ValueError, match="no unlabelled cases"):
        UnlabeledDataset({})
    with pytest.raises(FileNotFoundError, match="holds no nobody"):
        UnlabeledDataset({"nobody": tiny.labeled_dir}).load_case("nobody")


def preprocess_extra(tiny) -> Path:
    preprocess_unlabeled(951, configurations=["3d_fullres"], num_processes=1, show_progress=False)
    return tiny.unlabeled_dir


def test_find_unlabeled_unites_all_sources(tiny) -> None:
    folder = preprocess_extra(tiny)
    split = Split((IDS[0], IDS[6]), (IDS[5],), tuple(IDS[1:4]))
    pool = find_unlabeled(tiny.preprocessed, IDENTIFIER, split, 0)
    expected = dict.fromkeys(IDS[1:4], tiny.labeled_dir) | dict.fromkeys(["extra_000", "extra_001"], folder)
    assert pool.cases == expected and list(pool.cases) == sorted(expected)
    assert pool.without_previous_stage == ()
    # An id of the split may be in the unlabelled folder only; one that is in both is served from the labelled folder.
    shutil.copyfile(folder / "extra_000.b2nd", folder / f"{IDS[1]}.b2nd")
    split = Split((IDS[0],), (IDS[5],), (IDS[1], "extra_001"))
    cases = find_unlabeled(tiny.preprocessed, IDENTIFIER, split, 0).cases
    assert cases == {IDS[1]: tiny.labeled_dir, "extra_000": folder, "extra_001": folder}
    assert UnlabeledDataset(cases).load_case("extra_001")[0].shape[0] == 2


def test_find_unlabeled_without_any(tiny) -> None:
    assert find_unlabeled(tiny.preprocessed, IDENTIFIER, Split((IDS[0],), (IDS[1],)), 0).cases == {}


def test_find_unlabeled_rejects(tiny) -> None:
    with pytest.raises(FileNotFoundError, match=r"fold 2.*\['nobody'\].*nnUNetv2_preprocess -d 951"):
        find_unlabeled(tiny.preprocessed, IDENTIFIER, Split((), (), ("nobody", IDS[0])), 2)
    preprocess_extra(tiny)
    for split in (Split(("extra_000",), ()), Split((), ("extra_000",))):
        with pytest.raises(ValueError, match=r"holds \['extra_000'\], which fold 2 uses"):
            find_unlabeled(tiny.preprocessed, IDENTIFIER, split, 2)


def test_entirely_ignored(tiny) -> None:
    folder = tiny.labeled_dir
    assert entirely_ignored(folder, IDS, tiny.label_manager) == ["case_006"]
    assert entirely_ignored(folder, IDS[:6], tiny.label_manager) == []
    assert entirely_ignored(folder, IDS, NO_IGNORE) == []
    with pytest.raises(FileNotFoundError, match="nobody.pkl"):
        entirely_ignored(folder, ["nobody"], tiny.label_manager)
    labels = json.loads((tiny.preprocessed / "dataset.json").read_text())["labels"]
    changed = LabelManager({**labels, "other": 2, "ignore": 3}, None)
    with pytest.raises(ValueError, match="does not say which voxels are annotated"):
        entirely_ignored(folder, IDS, changed)
