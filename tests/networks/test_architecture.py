"""What nnU-Net planned, read back: dotted names, patch sizes, the network without its finest stage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from tiny import KINDS, arch_block, make_architecture
from torch import nn

from nnunet_diffext.networks.architecture import Architecture


@pytest.mark.parametrize("kind", KINDS)
def test_from_plans_builds_what_nnunet_builds(kind: str) -> None:
    spec = KINDS[kind]
    architecture = make_architecture(kind)
    assert architecture.network_class is (ResidualEncoderUNet if spec.residual else PlainConvUNet)
    assert architecture.conv_op is (nn.Conv2d if spec.dim == 2 else nn.Conv3d)
    assert architecture.dim == spec.dim
    assert architecture.strides == [tuple(s) for s in spec.strides]
    assert architecture.features == list(spec.features)
    net = architecture.build(3, 4)
    arguments = {"input_channels": 3, "num_classes": 4, "deep_supervision": False}
    reference = architecture.network_class(**arguments, **architecture.kwargs)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert net(torch.zeros(1, 3, *spec.patch)).shape == (1, 4, *spec.patch)


def test_initialised_as_nnunet_does() -> None:
    """He initialisation for leaky ReLU: zero biases, and residual blocks that start as identities."""
    net = make_architecture("2d-resenc").build(1, 2)
    assert all((m.bias == 0).all() for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert (net.encoder.stages[1].blocks[0].conv2.norm.weight == 0).all()


def test_deep_supervision_of_the_plans_is_ignored() -> None:
    block = arch_block(KINDS["2d"])
    kwargs = {**block["arch_kwargs"], "deep_supervision": True}
    architecture = Architecture.from_plans(block["network_class_name"], kwargs, block["_kw_requires_import"])
    out = architecture.build(1, 2).train()(torch.zeros(1, 1, 16, 16))
    assert isinstance(out, torch.Tensor)
    assert kwargs["deep_supervision"] is True, "the plans were changed"


def test_plans_are_left_alone() -> None:
    block = arch_block(KINDS["3d-aniso"])
    before = json.dumps(block)
    Architecture.from_plans(block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"]).coarser()
    assert json.dumps(block) == before


def test_unknown_class_is_named() -> None:
    with pytest.raises(ValueError, match="'no.such.Network', which cannot be imported"):
        Architecture.from_plans("no.such.Network", {}, [])


class NoUNet(nn.Module):
    """A network without decoder."""

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.Identity()


def test_other_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="NoUNet has no decoder.stages, decoder.transpconvs, decoder.seg_layers.*Plan"):
        Architecture(NoUNet, {}).build(1, 2)


def test_scalar_strides() -> None:
    assert Architecture(NoUNet, {"conv_op": nn.Conv3d, "strides": [1, 2]}).strides == [(1, 1, 1), (2, 2, 2)]


def test_scalar_kernels() -> None:
    flat = make_architecture(KINDS["2d"])
    for planned in (3, [3, 3, 3]):
        assert replace(flat, kwargs={**flat.kwargs, "kernel_sizes": planned}).kernels == [(3, 3)] * 3
    assert flat.kernels == [(3, 3)] * len(flat.features)


@pytest.mark.parametrize("kind", KINDS)
def test_planned_patches_fit(kind: str) -> None:
    make_architecture(kind).check_patch(KINDS[kind].patch)


@pytest.mark.parametrize(
    ("kind", "patch", "total", "suggestion"),
    [
        ("2d", (18, 24), [4, 4], [16, 24]),
        ("3d-aniso", (5, 16, 12), [2, 4, 4], [4, 16, 12]),
        ("3d-aniso", (1, 2, 13), [2, 4, 4], [2, 4, 12]),
    ],
)
def test_patch_that_does_not_fit(kind: str, patch: tuple[int, ...], total: list[int], suggestion: list[int]) -> None:
    architecture = make_architecture(kind)
    with pytest.raises(ValueError) as error:
        architecture.check_patch(patch)
    message = str(error.value)
    assert str(list(patch)) in message and f"stride {total}" in message and f"to {suggestion}" in message
    assert "'patch_size'" in message
    architecture.check_patch(suggestion)


@pytest.mark.parametrize("kind", ["2d", "3d", "3d-aniso", "3d-aniso-resenc", "2d-deep"])
def test_coarser_starts_at_the_second_stage(kind: str) -> None:
    spec = KINDS[kind]
    full, coarse = make_architecture(kind), make_architecture(kind).coarser()
    assert coarse.features == full.features[1:] and coarse.strides == full.strides[1:]
    out = coarse.build(1, 2)(torch.zeros(1, 1, *spec.patch))
    assert out.shape[2:] == tuple(p // s for p, s in zip(spec.patch, spec.strides[1], strict=True))
    assert full.features == list(spec.features), "the original was changed"


def test_coarser_keeps_the_decoder_of_the_coarse_stages() -> None:
    block = arch_block(KINDS["2d-deep"])
    block["arch_kwargs"]["n_conv_per_stage"] = [1, 2, 3, 4, 5, 6]
    block["arch_kwargs"]["n_conv_per_stage_decoder"] = [5, 4, 3, 2, 1]  # the coarsest first
    architecture = Architecture.from_plans(
        block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"]
    )
    net = architecture.coarser().build(1, 2)
    assert [len(stage[0].convs) for stage in net.encoder.stages] == [2, 3, 4, 5, 6]
    assert [len(stage.convs) for stage in net.decoder.stages] == [5, 4, 3, 2]


def test_two_stages_have_no_coarser_version() -> None:
    with pytest.raises(ValueError, match="fewer than 3 stages has no coarser version.*full-resolution"):
        make_architecture("2d-shallow").coarser()
