"""The count of a step's memory: against real tensors, against autograd's own hooks, and against published figures."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from small_plans import DATASET_JSON, plans_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_diffext.planners.dry_run import DryRun, estimate
from nnunet_diffext.planners.memory import CONTEXT, GIB, LiveBytes, StepMemory, count_step, forget_data, size_in_bytes
from nnunet_diffext.trainers import find_trainer

TRAINER = find_trainer("DMEDSegTrainer")
PATCH = (16, 16, 12)

images: list[int] = []
"""Batch sizes of the network's passes in the step that was counted last."""


def counted(step: DryRun, precision: torch.dtype | None) -> tuple[int, int, int]:
    """Bytes that autograd keeps, bytes alive after the forward pass, and the peak."""
    images.clear()
    step.network.ce.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
    weights = {p.untyped_storage()._cdata for p in step.network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with LiveBytes() as count:
        with torch.autograd.graph.saved_tensors_hooks(pack, nn.Identity()):
            with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
                losses = step.trainer.compute_losses(step.batch())
        forward = count.live
        sum(losses.values()).backward()
    return sum(kept.values()), forward, count.peak


def with_data(
    plans: dict[str, Any], precision: torch.dtype | None = None, trainer: type = TRAINER
) -> tuple[int, int, int]:
    return counted(DryRun(trainer, plans, "conf", DATASET_JSON), precision)


def without_data(
    plans: dict[str, Any], precision: torch.dtype | None = None, trainer: type = TRAINER
) -> tuple[int, int, int]:
    step = DryRun(trainer, plans, "conf", DATASET_JSON, data=False)
    with FakeTensorMode():
        forget_data(step.network)
        forget_data(step.teacher)
        return counted(step, precision)


@lru_cache
def estimated(tokens: str, patch_size: tuple[int, ...] = PATCH, batch_size: int = 2) -> StepMemory:
    return estimate(find_trainer(f"DMEDSegTrainer{tokens}"), plans_for(patch_size, batch_size), "conf", DATASET_JSON)


@pytest.mark.parametrize(("tokens", "patch_size"), [("", PATCH), ("_CEonly", (32, 32))])
def test_tensors_without_data_need_the_same_bytes_as_real_ones(tokens: str, patch_size: tuple[int, ...]) -> None:
    plans, trainer = plans_for(patch_size), find_trainer(f"DMEDSegTrainer{tokens}")
    kept, forward, peak = with_data(plans, trainer=trainer)
    without = without_data(plans, trainer=trainer)
    assert without[:2] == (kept, forward)
    # the gradient of an in-place activation, which autograd copies once more if there is data
    feature_map = 4 * max(images) * 8 * prod(patch_size)
    assert peak - feature_map <= without[2] <= peak
    assert 0.9 * forward < kept <= forward < peak


def test_mixed_precision_is_counted() -> None:
    plans, trainer = plans_for(PATCH), find_trainer("DMEDSegTrainer_CEonly")
    real, fake = (count(plans, torch.bfloat16, trainer)[:2] for count in (with_data, without_data))
    # a real normalisation keeps its statistics in fp32: a few numbers per channel
    assert [r - f for r, f in zip(real, fake, strict=True)] == pytest.approx([0] * 2, abs=real[0] / 200)
    assert fake[0] < 0.7 * with_data(plans, trainer=trainer)[0]


def test_live_bytes() -> None:
    with LiveBytes() as count:
        a = torch.zeros(1000)
        view = a.view(10, 100)[1:]
        assert (count.live, count.peak) == (4000, 4000)
        b = view + 1  # 900 numbers of its own
        assert count.live == 7600
        del a
        assert count.live == 7600, "the view still holds the storage"
        del view, b
        assert (count.live, count.peak) == (0, 7600)
        assert torch.ones(3).sum().item() == 3, "real numbers are read"


def test_fixed_memory_is_network_momentum_and_teacher() -> None:
    step = DryRun(find_trainer("DMEDSegTrainer_CEonly"), plans_for(PATCH), "conf", DATASET_JSON)
    weights = size_in_bytes(step.network)
    trained = sum(p.numel() * 4 for p in step.network.parameters())  # the optimiser keeps nothing for buffers
    assert estimated("_CEonly").fixed == 2 * weights + trained + CONTEXT
    assert estimated("_CEonly_noEMA_momentum0").fixed == weights + CONTEXT


def test_the_estimate_grows_with_patch_and_batch() -> None:
    sizes = [(PATCH, 2), (PATCH, 3), ((16, 32, 12), 3), ((32, 32, 24), 3)]
    totals = [estimated("_CEonly", *size).variable for size in sizes]
    assert totals == sorted(set(totals))
    per_voxel = [t / (b * p[0] * p[1] * p[2]) for t, (p, b) in zip(totals, sizes, strict=True)]
    assert max(per_voxel) < 1.3 * min(per_voxel), "guesses in proportion to the size are close"


def test_one_expert_needs_less_than_half_of_two() -> None:
    assert estimated("_CEonly").variable < 0.5 * estimated("").variable


@pytest.mark.parametrize(
    "labels",
    [
        {"labels": {"background": 0, "ball": 1, "ignore": 2}},
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]},
    ],
)
def test_a_real_step_trains(labels: dict[str, Any]) -> None:
    step = DryRun(TRAINER, plans_for(PATCH), "conf", {**DATASET_JSON, **labels})
    before = [p.clone() for p in step.network.parameters()]
    step.train()
    assert step.trainer.bad_steps == 0
    assert all(not torch.equal(a, b) for a, b in zip(before, step.network.parameters(), strict=True))


def test_plans_are_not_changed() -> None:
    plans = plans_for(PATCH)
    DryRun(TRAINER, plans, "conf", DATASET_JSON, data=False)
    assert plans == plans_for(PATCH)


class StockStep:
    """A training step of stock nnU-Net: patch 128^3, batch 2, deep supervision, Dice and cross-entropy."""

    moments, teacher = 1, None

    def __init__(self, network_class: type[nn.Module], **kwargs: Any) -> None:
        stages, patch = 6, 128
        with torch.device("meta"):
            self.network = network_class(
                input_channels=1, num_classes=2, n_stages=stages, features_per_stage=[32, 64, 128, 256, 320, 320],
                conv_op=nn.Conv3d, kernel_sizes=3, strides=[1, 2, 2, 2, 2, 2], conv_bias=True,
                norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
                nonlin_kwargs={"inplace": True}, deep_supervision=True, **kwargs,
            )  # fmt: skip
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        self.loss = DeepSupervisionWrapper(loss, [8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])
        self.scales = [patch // 2**level for level in range(stages - 1)]

    def losses(self) -> Tensor:
        targets = [torch.zeros(2, 1, s, s, s, dtype=torch.int16) for s in self.scales]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.loss(self.network(torch.zeros(2, 1, *[self.scales[0]] * 3)), targets)


@pytest.mark.parametrize(
    ("network_class", "kwargs", "published"),
    [
        (PlainConvUNet, {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}, 7.7),
        (ResidualEncoderUNet, {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": 1}, 9.1),
    ],
)
def test_stock_nnunet_comes_close_to_published_figures(
    network_class: type[nn.Module], kwargs: dict[str, Any], published: float
) -> None:
    # nnU-Net's documentation, resenc_presets.md: VRAM of 3d_fullres, default and ResEnc M
    step = StockStep(network_class, **kwargs)
    with FakeTensorMode():
        forget_data(step.network)
        assert count_step(step).total / GIB == pytest.approx(published, rel=0.1)


def test_large_batches_are_on_a_line() -> None:
    few, many, more = (estimated("_CEonly", PATCH, batch) for batch in (8, 16, 20))
    assert few.extrapolated(many, 1.5).total == pytest.approx(more.total, rel=1e-4)


def test_scaled() -> None:
    memory = StepMemory(fixed=GIB, variable=2 * GIB, workspace=GIB)
    assert memory.scaled(1) == memory
    assert memory.scaled(0.5).total == 2.5 * GIB
    assert memory.scaled(100).total == 201 * GIB + 2.25 * GIB, "the allowance has a limit"
    assert StepMemory(GIB, GIB, 0, measured=True).scaled(3).total == 4 * GIB
