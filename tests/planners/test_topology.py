"""Patch sizes and networks: those that nnU-Net's own planners come to."""

from __future__ import annotations

from math import prod

import pytest
import torch
from planned_dataset import Planned

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.planners.topology import require_unet, topologies

GRIDS = [
    ((1.0, 1.0, 1.0), (128, 256, 256)),
    ((5.0, 0.8, 0.8), (24, 320, 300)),
    ((1.25, 1.25, 1.25), (44, 71, 96)),
    ((0.7, 0.7), (512, 400)),
]


@pytest.mark.parametrize(("spacing", "median_shape"), GRIDS)
def test_patches_shrink_and_fit_their_network(spacing: tuple[float, ...], median_shape: tuple[int, ...]) -> None:
    found = list(topologies(spacing, median_shape))
    voxels = [t.voxels for t in found]
    assert voxels == sorted(set(voxels), reverse=True) and len(voxels) > 10
    for topology in found:
        assert len(topology.strides) == len(topology.kernel_sizes) >= 3
        stride = [prod(axis) for axis in zip(*topology.strides, strict=True)]
        assert not any(p % s for p, s in zip(topology.patch_size, stride, strict=True))
    assert found[-1].voxels < 0.05 * found[0].voxels, "small targets have something to choose from"
    assert all(p < m + 64 for p, m in zip(found[0].patch_size, median_shape, strict=True))


@pytest.mark.parametrize("plans_name", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_what_nnunet_planned_is_among_them(planned: Planned, plans_name: str, name: str) -> None:
    configuration = planned.read(plans_name)["configurations"][name]
    found = topologies(configuration["spacing"], configuration["median_image_size_in_voxels"])
    (same,) = [t for t in found if list(t.patch_size) == configuration["patch_size"]]
    assert same.architecture(configuration["architecture"]) == configuration["architecture"]


@pytest.mark.parametrize("plans_name", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
def test_more_and_fewer_stages_than_planned(planned: Planned, plans_name: str) -> None:
    block = planned.read(plans_name)["configurations"]["3d_fullres"]["architecture"]
    assert block["arch_kwargs"]["n_stages"] == 4
    found = list(topologies((1.0, 1.0, 1.0), (256, 256, 256)))
    features = {3: [32, 64, 128], 6: [32, 64, 128, 256, 320, 320]}
    for stages, widths in features.items():
        topology = next(t for t in found if len(t.strides) == stages)
        new = topology.architecture(block)
        assert new["arch_kwargs"]["features_per_stage"] == widths
        built = Architecture.from_plans(new["network_class_name"], new["arch_kwargs"], new["_kw_requires_import"])
        with torch.device("meta"):
            net = built.build(1, 2)
        assert len(net.encoder.stages) == stages
    assert block["arch_kwargs"]["n_stages"] == 4, "the base is not changed"


def test_a_network_without_stages_is_refused(planned: Planned) -> None:
    block = planned.read("nnUNetPlans")["configurations"]["3d_fullres"]["architecture"]
    del block["arch_kwargs"]["strides"]
    with pytest.raises(ValueError, match="without strides"):
        require_unet(block)
