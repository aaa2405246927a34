"""``dice_ce_loss`` against nnU-Net's own losses, and what its voxel weights must do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.losses.segmentation import cross_entropy, dice_ce_loss, soft_dice_loss

PATCHES = [(7, 9), (4, 5, 6)]
IGNORE = 3


def nnunet_loss(space: LabelSpace, batch_dice: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """As ``nnUNetTrainer._build_loss`` makes it. It counts Dice as ``-Dice``, hence lies one below ours."""
    dice_kwargs = {"batch_dice": batch_dice, "do_bg": space.regions, "smooth": 1e-5, "ddp": False}
    if space.regions:
        ignore = space.ignore_label is not None
        return DC_and_BCE_loss({}, dice_kwargs, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(
        dice_kwargs, {}, ignore_label=space.ignore_label, dice_class=MemoryEfficientSoftDiceLoss
    )  # fmt: skip


def draw(space: LabelSpace, patch: tuple[int, ...], batch: int = 3) -> tuple[Tensor, Tensor]:
    """Logits, and a target in which the last sample lacks the foreground: empty samples count as in nnU-Net."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, space.num_heads, *patch, generator=generator)
    if space.regions:
        target = torch.rand(batch, space.target_channels, *patch, generator=generator) < 0.4
        target[-1, : space.num_heads] = False
    else:
        target = torch.randint(space.num_heads, (batch, 1, *patch), generator=generator)
        target[-1] = 0
        if space.ignore_label is not None:
            target[torch.rand(target.shape, generator=generator) < 0.3] = space.ignore_label
    return logits, target


def ours(space: LabelSpace, logits: Tensor, target: Tensor, batch_dice: bool) -> Tensor:
    onehot, valid = space.encode(target)
    return dice_ce_loss(logits, onehot, valid, regions=space.regions, batch_dice=batch_dice)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize(
    "space",
    [LabelSpace(2), LabelSpace(3), LabelSpace(3, ignore_label=IGNORE), LabelSpace(2, True), LabelSpace(1, True)],
    ids=["binary", "classes", "classes-ignore", "regions", "one-region"],
)
def test_equals_nnunets_loss(space: LabelSpace, batch_dice: bool, patch: tuple[int, ...]) -> None:
    logits, target = draw(space, patch)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = ours(space, mine, target, batch_dice), nnunet_loss(space, batch_dice)(theirs, target)
    assert loss.item() == pytest.approx(expected.item() + 1, abs=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_with_ignore_differ_from_nnunet_in_the_scale_of_bce_only(batch_dice: bool) -> None:
    """With an ignore label nnU-Net sums the BCE over regions, without one it takes their mean, as ours always does."""
    space = LabelSpace(2, regions=True, ignore_label=IGNORE)
    logits, target = draw(space, (7, 9))
    loss = nnunet_loss(space, batch_dice)
    loss.weight_ce = 1 / space.num_heads
    assert ours(space, logits, target, batch_dice).item() == pytest.approx(loss(logits, target).item() + 1, abs=1e-5)


def test_entirely_ignored_sample_does_not_count() -> None:
    """nnU-Net gives such a sample the Dice 0/0 = 1; here the mean is over the other samples."""
    space = LabelSpace(2, ignore_label=IGNORE)
    logits, target = draw(space, (7, 9), batch=2)
    target[1] = IGNORE
    alone = ours(space, logits[:1], target[:1], batch_dice=False)
    assert ours(space, logits, target, batch_dice=False).item() == pytest.approx(alone.item(), abs=1e-6)
    assert nnunet_loss(space, False)(logits, target).item() + 1 < alone.item() - 0.1


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_voxels_without_weight_are_invisible(regions: bool, batch_dice: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, generator=generator, requires_grad=True)
    weight = (torch.rand(2, 1, 6, 7, generator=generator) > 0.4).float() * torch.rand(2, 1, 6, 7, generator=generator)
    targets = [torch.rand(2, 3, 6, 7, generator=generator) for _ in range(2)]
    targets[1] = torch.where(weight > 0, targets[0], 100 * targets[1])
    losses = [dice_ce_loss(logits, t, weight, regions=regions, batch_dice=batch_dice) for t in targets]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*gradients)
    outside = (weight == 0).expand_as(logits)
    assert gradients[0][outside].abs().max() == 0
    assert (gradients[0][~outside] != 0).all()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_no_weight_at_all_gives_exactly_zero(regions: bool, batch_dice: bool) -> None:
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = dice_ce_loss(logits, torch.ones(2, 2, 4, 4), torch.zeros(2, 1, 4, 4), regions=regions, batch_dice=batch_dice)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_soft_weights_by_hand() -> None:
    """Two voxels with foreground probabilities 3/4 and 1/4, both foreground, weights 1 and 1/2."""
    probability, weight = torch.tensor([0.75, 0.25]), torch.tensor([1.0, 0.5])
    logits = torch.stack([1 - probability, probability]).log()[None]
    onehot = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    ce = (1 * math.log(4 / 3) + 0.5 * math.log(4)) / 1.5
    intersection, cardinality = 0.75 + 0.125, (0.75 + 1) + 0.5 * (0.25 + 1)
    dice = (2 * intersection + 1e-5) / (cardinality + 1e-5)
    assert cross_entropy(logits, onehot, weight[None, None]).item() == pytest.approx(ce, abs=1e-6)
    loss = soft_dice_loss(logits.softmax(1), onehot, weight[None, None], skip_background=True)
    assert loss.item() == pytest.approx(1 - dice, abs=1e-6)
    assert dice_ce_loss(logits, onehot, weight[None, None]).item() == pytest.approx(1 - dice + ce, abs=1e-6)


def test_constant_weight_changes_nothing() -> None:
    """Both parts are ratios of weighted sums, so that only relative confidence matters."""
    logits, target = torch.randn(2, 2, 5, 5), torch.eye(2)[torch.randint(2, (2, 5, 5))].movedim(-1, 1)
    full = dice_ce_loss(logits, target, torch.ones(2, 1, 5, 5))
    assert dice_ce_loss(logits, target, torch.full((2, 1, 5, 5), 0.25)).item() == pytest.approx(full.item(), abs=1e-5)


def test_computed_in_fp32_under_autocast() -> None:
    logits, target = torch.randn(1, 2, 8, 8), torch.eye(2)[torch.randint(2, (1, 8, 8))].movedim(-1, 1)
    weight = torch.ones(1, 1, 8, 8)
    expected = dice_ce_loss(logits.bfloat16().float(), target, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dice_ce_loss(logits.bfloat16(), target.bfloat16(), weight.bfloat16())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
