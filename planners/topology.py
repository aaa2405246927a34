"""Patch sizes in the order in which nnU-Net's planner tries them, each with the U-Net that nnU-Net builds for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_diffext.networks.architecture import Architecture

MIN_EDGE = 4
"""Smallest edge of the deepest feature map, as in nnU-Net's planners."""
MIN_STAGES = 3
"""Below this, a U-Net sees too little context to be worth planning."""
START_VOXELS = {2: 2048**2, 3: 256**3}
MAX_FEATURES = {2: 512, 3: 320}
PER_STAGE = ("n_conv_per_stage", "n_blocks_per_stage")


@dataclass(frozen=True)
class Topology:
    """One patch size and what follows from it.

    Attributes:
        patch_size: in voxels.
        strides, kernel_sizes: per stage and axis.
    """

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]

    @property
    def voxels(self) -> int:
        """Number of voxels of a patch."""
        return prod(self.patch_size)

    def architecture(self, planned: Mapping[str, Any]) -> dict[str, Any]:
        """The ``architecture`` block of a plans file, with as many stages as this topology has.

        Args:
            planned: the block of the base plans. Widths and numbers of convolutions go on as they begin there.
        """
        block = deepcopy(dict(planned))
        kwargs = block["arch_kwargs"]
        stages = len(self.strides)
        widest = max(MAX_FEATURES[len(self.patch_size)], *kwargs["features_per_stage"])
        kwargs["n_stages"] = stages
        kwargs["strides"] = [list(s) for s in self.strides]
        kwargs["kernel_sizes"] = [list(k) for k in self.kernel_sizes]
        kwargs["features_per_stage"] = _extended(kwargs["features_per_stage"], stages, widest)
        for key in PER_STAGE:
            if isinstance(kwargs.get(key), (list, tuple)):
                kwargs[key] = _repeated(kwargs[key], stages)
        if isinstance(kwargs.get("n_conv_per_stage_decoder"), (list, tuple)):
            kwargs["n_conv_per_stage_decoder"] = _repeated(kwargs["n_conv_per_stage_decoder"], stages - 1)
        built = Architecture.from_plans(block["network_class_name"], kwargs, block["_kw_requires_import"])
        built.check_patch(self.patch_size)
        return block


def topologies(spacing: Sequence[float], median_shape: Sequence[float]) -> Iterator[Topology]:
    """From the largest patch that nnU-Net considers down to the smallest of at least three stages.

    As in ``ExperimentPlanner.get_plans_for_configuration``: the first patch has the aspect ratio of the spacing and is
    clipped to the median image; then the axis that covers most of the median image shrinks.

    Args:
        spacing: target spacing in mm, 2 or 3 axes.
        median_shape: median image size in voxels at that spacing.
    """
    dim = len(spacing)
    aspect = 1 / np.asarray(spacing, dtype=float)
    patch = [round(a) for a in aspect * (START_VOXELS[dim] / np.prod(aspect)) ** (1 / dim)]
    patch = [min(p, m) for p, m in zip(patch, median_shape, strict=False)]
    topology, multiple = _topology(spacing, patch)
    enough = min(MIN_STAGES, len(topology.strides))
    while len(topology.strides) >= enough:
        yield topology
        covered = [p / m for p, m in zip(topology.patch_size, median_shape, strict=False)]
        axis = int(np.argsort(covered)[-1])
        smaller = list(topology.patch_size)
        smaller[axis] -= int(multiple[axis])
        if smaller[axis] < 1:
            return
        # a smaller patch may be divisible by less: 256 -> 224, not 192
        _, multiple = _topology(spacing, smaller)
        patch = list(topology.patch_size)
        patch[axis] -= int(multiple[axis])
        previous = topology
        topology, multiple = _topology(spacing, patch)
        if topology.voxels >= previous.voxels:
            return


def _topology(spacing: Sequence[float], patch: Sequence[float]) -> tuple[Topology, np.ndarray]:
    _, strides, kernels, padded, multiple = get_pool_and_conv_props(spacing, patch, MIN_EDGE, 999999)
    return Topology(tuple(int(p) for p in padded), strides, kernels), multiple


def _extended(features: Sequence[int], stages: int, widest: int) -> list[int]:
    result = list(features[:stages])
    while len(result) < stages:
        result.append(min(widest, 2 * result[-1]))
    return result


def _repeated(values: Sequence[int], count: int) -> list[int]:
    return [values[min(i, len(values) - 1)] for i in range(count)]


def require_unet(block: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if the ``architecture`` block of a plans file describes no U-Net stage by stage."""
    needed = ("n_stages", "features_per_stage", "strides", "kernel_sizes")
    missing = [key for key in needed if key not in block["arch_kwargs"]]
    if missing:
        raise ValueError(
            f"The base plans use {block['network_class_name']} without {', '.join(missing)}, so it is no U-Net whose "
            "stages can be planned anew. Use plans of nnU-Net's default or ResEnc planners (-p nnUNetPlans)."
        )
