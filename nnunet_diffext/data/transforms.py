"""Two views of one patch for consistency training: same geometry, one of them with nnU-Net's intensity augmentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms, TimedComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import OneOfTransform, RandomTransform
from torch.nn.functional import max_pool2d, max_pool3d

# Of intensities that are normalised to a standard deviation of 1. Resampling by cubic splines rings outside the mask
# and falls by 0.27 per voxel, so this leaves a rim of about five voxels; without resampling there is none.
NEARLY_ZERO = 1e-2
COMPOSED = (ComposeTransforms, TimedComposeTransforms)


class TwoViews(BasicTransform):
    """Applies nnU-Net's training transforms so that a patch comes out twice: weakly and strongly augmented.

    The strong view gets every transform: with the same random state it is what the wrapped transforms alone give, but
    for the last bits (memory layout) and for :func:`_mark_outside`. The weak view gets the same with the same
    parameters, without those that change the image only: noise, blur, brightness, contrast, low resolution, gamma and,
    in a cascade, the corruption of the previous segmentation.

    The list is walked in its own order, with two samples from the first image-only transform on. Drawing parameters
    once and applying them twice leaves masking by channel index, the one-hot channels of a cascade and dummy 2D
    augmentation as they are; stacking the views as channels, or sorting the list, would have to know every transform.

    Args:
        transforms: from ``nnUNetTrainer.get_training_transforms``.

    Raises:
        TypeError: a transform that does not separate drawing from applying, so that it cannot be shared.
    """

    def __init__(self, transforms: BasicTransform) -> None:
        super().__init__()
        self.transforms = transforms
        _check_shareable(transforms)

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        """One sample.

        Args:
            data_dict: ``image`` ``(C, *spatial)``, ``segmentation`` ``(S, *spatial)``.

        Returns:
            ``image`` ``(2 * C', *patch)``: weak channels, then strong ones (``C'`` includes the one-hot channels of a
            cascade); ``segmentation`` as the wrapped transforms give it.
        """
        weak, strong = self._step(self.transforms, dict(data_dict), None)
        strong_image = weak["image"] if strong is None else strong["image"]
        return {**weak, "image": torch.cat([weak["image"], strong_image], dim=0)}

    def _step(
        self, transform: BasicTransform, weak: dict[str, Any], strong: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Apply one transform. ``strong`` is None as long as the views are the same."""
        if changes_image_only(transform):
            if strong is None:
                strong = {**weak, "image": weak["image"].clone()}
            return weak, transform(**strong)
        if isinstance(transform, COMPOSED):
            for inner in transform.transforms:
                weak, strong = self._step(inner, weak, strong)
            return weak, strong
        if isinstance(transform, RandomTransform):
            drawn = transform.get_parameters(**weak)["apply_transform"]
            return self._step(transform.transform, weak, strong) if drawn else (weak, strong)
        if isinstance(transform, OneOfTransform):
            return self._step(np.random.choice(transform.list_of_transforms), weak, strong)
        return _share(transform, weak, strong)


def changes_image_only(transform: BasicTransform) -> bool:
    """Whether a transform, or all that it contains, leaves geometry and segmentation alone."""
    inner = _inner(transform)
    if inner is not None:
        return bool(inner) and all(changes_image_only(t) for t in inner)
    return isinstance(transform, ImageOnlyTransform)


def _inner(transform: BasicTransform) -> list[BasicTransform] | None:
    """What a container contains; None for other transforms."""
    if isinstance(transform, COMPOSED):
        return list(transform.transforms)
    if isinstance(transform, RandomTransform):
        return [transform.transform]
    return list(transform.list_of_transforms) if isinstance(transform, OneOfTransform) else None


def _check_shareable(transform: BasicTransform) -> None:
    inner = _inner(transform)
    for t in inner or []:
        _check_shareable(t)
    if inner is None and not changes_image_only(transform) and type(transform).__call__ is not BasicTransform.__call__:
        raise TypeError(
            f"{type(transform).__name__} overrides __call__, so it cannot be applied to two views with the same "
            "parameters. Let it draw in get_parameters and change the data in apply, as batchgeneratorsv2 does."
        )


def _share(
    transform: BasicTransform, weak: dict[str, Any], strong: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Apply a transform to both views with the same parameters."""
    if isinstance(transform, MaskImageTransform):
        weak = _mark_outside(transform, weak)
        strong = strong if strong is None else {**strong, "segmentation": weak["segmentation"]}
    # Drawn for the strong view, which thereby equals the output of the wrapped transforms.
    params = transform.get_parameters(**(weak if strong is None else strong))
    if strong is None:
        return transform.apply(weak, **params), None
    if isinstance(transform, SegOnlyTransform):
        weak = transform.apply(weak, **params)
        return weak, {**strong, "segmentation": weak["segmentation"]}
    # Both have the same segmentation. It may be changed in place, and must not be so twice.
    segmentation = strong["segmentation"]
    if isinstance(segmentation, torch.Tensor):
        strong = {**strong, "segmentation": segmentation.clone()}
    return transform.apply(weak, **params), transform.apply(strong, **params)


def _mark_outside(transform: MaskImageTransform, sample: dict[str, Any]) -> dict[str, Any]:
    """Find the voxels outside the nonzero mask in the image: nnU-Net marks them with -1 in the label file, which is not
    read here.

    Normalisation within the mask leaves zeros outside, nearly zeros after resampling. Inside, where zero is the mean,
    single voxels are as small, but hardly ever 3x3x3 together (a morphological opening). Labels are not touched.
    """
    if not transform.apply_to_channels:
        return sample
    pool = max_pool3d if sample["image"].ndim == 4 else max_pool2d
    largest = sample["image"][transform.apply_to_channels].abs().amax(dim=0, keepdim=True)
    core = pool(largest, kernel_size=3, stride=1, padding=1) < NEARLY_ZERO
    outside = pool(core.float(), kernel_size=3, stride=1, padding=1)[0] > 0
    segmentation = sample["segmentation"].clone()
    channel = segmentation[transform.channel_idx_in_seg]
    channel[outside & (channel == 0)] = -1
    return {**sample, "segmentation": segmentation}
