from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import distance_transform_edt

from nnunet_diffext.data.transforms import TwoViews, changes_image_only

PIPELINES = {
    "3d": {"patch_size": (10, 12, 14)},
    "2d": {"patch_size": (12, 14), "mirror_axes": (0, 1)},
    "dummy_2d": {"patch_size": (8, 12, 14), "do_dummy_2d_data_aug": True},
    "deep_supervision": {"patch_size": (8, 12, 12), "deep_supervision_scales": [[1, 1, 1], [0.5, 0.5, 0.5]]},
    "cascade": {"patch_size": (10, 12, 14), "is_cascaded": True, "foreground_labels": [1, 2]},
    "regions": {"patch_size": (10, 12, 14), "regions": [(1, 2), 2], "ignore_label": 3},
    "masked": {"patch_size": (10, 12, 14), "use_mask_for_norm": [False, True]},
}
PIPELINES["cascade_regions_masked"] = {k: v for p in ("cascade", "regions", "masked") for k, v in PIPELINES[p].items()}


class OnACopy(BasicTransform):
    """Draws what the inner transform draws, and leaves the sample alone."""

    def __init__(self, inner: BasicTransform) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, **data: Any) -> dict[str, Any]:
        self.inner(**{**data, "image": data["image"].clone()})
        return data


class Compact(BasicTransform):
    """Copies the image, as TwoViews does. Sums over a crop, a view with gaps in memory, round differently."""

    def __call__(self, **data: Any) -> dict[str, Any]:
        return {**data, "image": data["image"].clone()}


class CountInPlace(BasicTransform):
    """Adds 1 to the segmentation in place."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        data_dict["segmentation"] += 1
        return data_dict


def pipeline(name: str, probability: float | None = None) -> ComposeTransforms:
    defaults = {"deep_supervision_scales": None, "mirror_axes": (0, 1, 2), "do_dummy_2d_data_aug": False}
    transforms = nnUNetTrainer.get_training_transforms(
        **{"rotation_for_DA": (-0.6, 0.6), **defaults, **PIPELINES[name]}
    )
    for t in transforms.transforms:
        if isinstance(t, RandomTransform):
            t.apply_probability = t.apply_probability if probability is None else probability
            if hasattr(t.transform, "benchmark"):
                t.transform.benchmark = False  # chooses between two kernels by their run time
    return transforms


def sample(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two channels around a body; the segmentation is -1 where both are 0, as after nnU-Net's preprocessing."""
    rng = torch.Generator().manual_seed(seed)
    shape = tuple(s + 6 for s in PIPELINES[name]["patch_size"])
    image = torch.randn((2, *shape), generator=rng)
    segmentation = torch.randint(0, 3, (2 if "cascade" in name else 1, *shape), generator=rng).to(torch.int16)
    outside = torch.zeros(shape, dtype=torch.bool)
    outside[..., : shape[-1] // 2] = True
    image[:, outside] = 0
    segmentation[:, outside] = -1
    return {"image": image, "segmentation": segmentation}


def seeded(transform: BasicTransform, name: str, seed: int) -> dict[str, Any]:
    np.random.seed(seed)
    torch.manual_seed(seed)
    return transform(**sample(name, seed))


def views(out: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(out["image"].chunk(2))


def same_segmentation(a: Any, b: Any) -> bool:
    return all(map(torch.equal, a, b)) if isinstance(a, list) else torch.equal(a, b)


@pytest.mark.parametrize("name", PIPELINES)
def test_strong_is_nnunets_own_result_and_weak_the_same_without_intensity(name) -> None:
    # Every intensity transform is drawn half of the time, so that ten seeds meet many combinations.
    wrapped = TwoViews(pipeline(name, 0.5))
    stock = pipeline(name, 0.5)
    first = next(i for i, t in enumerate(stock.transforms) if changes_image_only(t))
    stock.transforms.insert(first, Compact())
    weak_oracle = ComposeTransforms(
        [OnACopy(t) if changes_image_only(t) else t for t in pipeline(name, 0.5).transforms]
    )
    differences = 0
    for seed in range(10):
        out = seeded(wrapped, name, seed)
        weak, strong = views(out)
        expected, expected_weak = seeded(stock, name, seed), seeded(weak_oracle, name, seed)
        if "masked" not in name:
            # The mask is found in the image, not in the segmentation: see the tests of masking.
            assert torch.equal(strong, expected["image"])
            assert torch.equal(weak, expected_weak["image"])
        assert same_segmentation(out["segmentation"], expected["segmentation"])
        assert strong.shape == expected["image"].shape
        differences += not torch.equal(weak, strong)
    assert differences >= 8


@pytest.mark.parametrize("name", PIPELINES)
def test_without_intensity_both_views_are_the_same(name) -> None:
    for seed in range(5):
        weak, strong = views(seeded(TwoViews(pipeline(name, 0.0)), name, seed))
        assert torch.equal(weak, strong) and weak.any()


@pytest.mark.parametrize("name", PIPELINES)
def test_pickles(name) -> None:
    wrapped = TwoViews(pipeline(name, 0.5))
    copy = pickle.loads(pickle.dumps(wrapped))
    assert torch.equal(seeded(wrapped, name, 1)["image"], seeded(copy, name, 1)["image"])


def test_views_share_the_geometry() -> None:
    brightness = MultiplicativeBrightnessTransform((2, 2), True, 1)
    for seed in range(8):
        out = seeded(TwoViews(ComposeTransforms([brightness, MirrorTransform((0, 1, 2))])), "3d", seed)
        weak, strong = views(out)
        assert torch.equal(strong, 2 * weak)


def test_the_input_is_not_changed_by_the_strong_view() -> None:
    data = sample("3d")
    before = data["image"].clone()
    weak, strong = views(TwoViews(GaussianNoiseTransform((1, 1), 1, True))(**data))
    assert torch.equal(weak, before) and torch.equal(data["image"], before) and not torch.equal(strong, before)


def test_cascade_channels_are_in_both_views() -> None:
    data = sample("cascade")
    transforms = ComposeTransforms([GaussianNoiseTransform((1, 1), 1, True), MoveSegAsOneHotToDataTransform(1, [1, 2])])
    out = TwoViews(transforms)(**data)
    weak, strong = views(out)
    one_hot = torch.stack([data["segmentation"][1] == label for label in (1, 2)]).float()
    assert torch.equal(weak[2:], one_hot) and torch.equal(strong[2:], one_hot)
    assert out["segmentation"].shape[0] == 1


def test_nested_and_chosen_transforms() -> None:
    double, noise = MultiplicativeBrightnessTransform((2, 2), True, 1), GaussianNoiseTransform((1, 1), 1, True)
    mirror = MirrorTransform((0, 1, 2))
    nested = RandomTransform(ComposeTransforms([double, mirror, OneOfTransform([double, double])]), 1.0)
    assert not changes_image_only(nested) and changes_image_only(OneOfTransform([double, noise]))
    assert not changes_image_only(OneOfTransform([double, mirror]))
    for seed in range(5):
        weak, strong = views(seeded(TwoViews(nested), "3d", seed))
        assert torch.equal(strong, 4 * weak)
    chosen = [views(seeded(TwoViews(OneOfTransform([double, mirror])), "3d", seed)) for seed in range(10)]
    assert {torch.equal(*pair) for pair in chosen} == {True, False}


def test_a_shared_transform_changes_the_segmentation_once() -> None:
    data = sample("3d")
    before = data["segmentation"].clone()
    transforms = ComposeTransforms([GaussianNoiseTransform((1, 1), 1, True), CountInPlace(), CountInPlace()])
    assert torch.equal(TwoViews(transforms)(**data)["segmentation"], before + 2)


def test_a_transform_that_cannot_be_shared_is_rejected() -> None:
    with pytest.raises(TypeError, match="OnACopy overrides __call__"):
        TwoViews(ComposeTransforms([RandomTransform(OnACopy(MirrorTransform((0,))), 0.5)]))


def test_masking_finds_the_outside_without_a_label() -> None:
    data = sample("masked")
    outside = data["segmentation"][0] == -1
    transforms = ComposeTransforms(
        [GaussianNoiseTransform((1, 1), 1, True), MaskImageTransform([1], 0, 5.0), RemoveLabelTransform(-1, 0)]
    )
    data["segmentation"] = torch.zeros_like(data["segmentation"])
    weak, strong = views(TwoViews(transforms)(**data))
    for view in (weak, strong):
        assert torch.equal(view[1] == 5.0, outside)
        assert not (view[0] == 5.0).any()
    # Labels stay, also where the image is zero.
    data = sample("masked") | {"segmentation": torch.ones_like(data["segmentation"])}
    out = TwoViews(transforms)(**data)
    assert torch.equal(out["segmentation"], data["segmentation"]) and not (out["image"] == 5.0).any()


def test_masking_after_resampling() -> None:
    """Ringing of amplitude 3 falls by 0.27 per voxel: below the threshold after 5, and the opening needs 1 more."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.arange(40)] * 3, indexing="ij", sparse=True)
    body = sum((a - 20.0) ** 2 for a in axes) < 10**2
    image = np.where(body, rng.normal(size=body.shape), 0)[None].astype(np.float32)
    shape = (46, 46, 46)
    spacings = (1.15, 1.15, 1.15), (1.0, 1.0, 1.0)
    kwargs = {"order_z": 0, "force_separate_z": None}
    data = resample_data_or_seg_to_shape(image, shape, *spacings, is_seg=False, order=3, **kwargs)
    mask = np.where(body, 0, -1)[None].astype(np.int8)
    outside = resample_data_or_seg_to_shape(mask, shape, *spacings, is_seg=True, order=1, **kwargs)[0] < 0
    assert (data[0][outside] == 0).mean() < 0.5  # looking for exact zeros would not do
    transforms = ComposeTransforms([GaussianNoiseTransform((1, 1), 1, True), MaskImageTransform([0], 0, 99.0)])
    blank = torch.zeros((1, *shape), dtype=torch.int16)
    strong = views(TwoViews(transforms)(image=torch.from_numpy(data), segmentation=blank))[1]
    found = (strong[0] == 99.0).numpy()
    assert found[distance_transform_edt(outside) > 6].all()
    assert not found[~outside].any()
