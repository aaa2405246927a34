"""Labels that nobody looked for in a sample: not taught as background, not counted, and of no influence on the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_diffext.losses.segmentation import (
    cross_entropy,
    dice_ce_loss,
    merge_unannotated,
    soft_dice_loss,
    without_unannotated,
)

ALL = torch.ones(2, 3, dtype=torch.bool)
ONE_LESS = torch.tensor([[True, True, False], [True, True, True]])
"""Nobody looked for head 2 in the first of two samples."""


def logits(seed: int = 0, heads: int = 3, size: int = 6) -> Tensor:
    return 3 * torch.randn(2, heads, size, 5, generator=torch.Generator().manual_seed(seed))


def labels(heads: int = 3, seed: int = 1, size: int = 6) -> Tensor:
    return torch.randint(heads, (2, 1, size, 5), generator=torch.Generator().manual_seed(seed))


def onehot(target: Tensor, heads: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(target[:, 0], heads).movedim(-1, 1).float()


# ------------------------------------------------------------------ what becomes of the probabilities
def test_probability_without_annotation_is_that_of_the_background() -> None:
    x = logits()
    before, after = x.softmax(1), merge_unannotated(x, ONE_LESS).softmax(1)
    torch.testing.assert_close(after[0, 0], before[0, 0] + before[0, 2])
    torch.testing.assert_close(after[0, 1], before[0, 1])
    assert after[0, 2].abs().max() == 0
    torch.testing.assert_close(after[1], before[1])


def test_regions_without_annotation_are_silent() -> None:
    x = logits()
    after = merge_unannotated(x, ONE_LESS, regions=True)
    assert after[0, 2].sigmoid().max() == 0
    assert torch.equal(after[0, :2], x[0, :2]) and torch.equal(after[1], x[1])


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)])
def test_extreme_logits(dtype: torch.dtype, size: float, regions: bool) -> None:
    """Finite, and what nobody looked for stays impossible even where everything else is just as improbable."""
    x = (size * torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)).to(dtype)
    x[..., 0, 0] = -size
    x.requires_grad_()
    merged = merge_unannotated(x, ONE_LESS, regions=regions)
    assert merged.dtype == torch.float32 and not merged.isnan().any()
    p = merged.sigmoid() if regions else merged.softmax(1)
    assert p.isfinite().all() and p[0, 2].max() == 0
    loss = dice_ce_loss(x, onehot(labels(2)), torch.ones(2, 1, 6, 5), regions=regions, annotated=ONE_LESS)
    loss.backward()
    assert not loss.isnan() and not x.grad.isnan().any()


# ------------------------------------------------------------------ what is learned
def background_loss(x: Tensor, annotated: Tensor) -> Tensor:
    """Of two samples in which there is nothing but background."""
    target = torch.zeros(2, 1, 6, 5, dtype=torch.long)
    return dice_ce_loss(x, onehot(target), torch.ones(2, 1, 6, 5), annotated=annotated)


def test_finding_what_nobody_looked_for_costs_nothing() -> None:
    """Head 2 everywhere in the background: free in the sample where nobody looked, expensive where it was ruled out."""
    x = torch.zeros(2, 3, 6, 5)
    x[:, 2] = 40
    assert background_loss(x[[0, 0]], ONE_LESS[[0, 0]]).item() == pytest.approx(0, abs=1e-4)
    assert background_loss(x[[1, 1]], ONE_LESS[[1, 1]]).item() > 10
    x = x.requires_grad_()
    background_loss(x, ONE_LESS).backward()
    assert x.grad[0].abs().max() < 1e-6 and x.grad[1, 2].min() > 0.01


def test_gradient_never_drives_out_what_nobody_looked_for() -> None:
    x = logits().requires_grad_()
    background_loss(x, ONE_LESS).backward()
    assert (x.grad[0, 2] < 0).all(), "as good as background"
    assert (x.grad[0, 1] > 0).all() and (x.grad[1, 1:] > 0).all()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_loss_is_that_of_the_other_heads(regions: bool, batch_dice: bool) -> None:
    """By hand, head by head: those of a sample that are not annotated take part nowhere."""
    x = logits()
    target = onehot(labels(2)) if not regions else (logits(3) > 0).float()
    target[1] = onehot(labels())[1] if not regions else target[1]
    weight = (torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    annotated = ONE_LESS if not regions else torch.tensor([[True, False, True], [True, True, False]])
    p = x.sigmoid() if regions else merge_unannotated(x, annotated).softmax(1)
    sums: dict[Any, list[Tensor]] = {}
    ce, count = 0.0, 0.0
    for b in range(2):
        own = [k for k in range(3) if annotated[b, k]]
        for k in own if regions else own[1:]:
            parts = torch.stack([(weight[b, 0] * p[b, k] * target[b, k]).sum(), (weight[b] * (p + target)[b, k]).sum()])
            sums.setdefault(k if batch_dice else (b, k), []).append(parts)
        if regions:
            q, t = p[b, own], target[b, own]
            ce += (weight[b] * -(t * q.log() + (1 - t) * (1 - q).log()).mean(0)).sum()
        else:
            ce += (weight[b] * -(target[b] * p[b].clamp_min(1e-30).log()).sum(0)).sum()
        count += weight[b].sum()
    dice = torch.stack([(2 * s[0] + 1e-5) / (s[1] + 1e-5) for s in (torch.stack(v).sum(0) for v in sums.values())])
    given = {"regions": regions, "batch_dice": batch_dice, "annotated": annotated}
    loss = dice_ce_loss(x, target, weight, dice_weight=0.6, ce_weight=0.4, **given)
    assert loss.item() == pytest.approx((0.6 * (1 - dice.mean()) + 0.4 * ce / count).item(), rel=1e-4)
    with_all = dice_ce_loss(x, target, weight, dice_weight=0.6, ce_weight=0.4, **{**given, "annotated": ALL})
    assert abs(with_all - loss) > 1e-3


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_heads_that_nobody_has_do_not_matter(regions: bool, batch_dice: bool) -> None:
    """However many further heads the other modalities bring."""
    x = logits()
    target = onehot(labels()) if not regions else (logits(3) > 0).float()
    weight, options = torch.ones(2, 1, 6, 5), {"regions": regions, "batch_dice": batch_dice}
    plain = dice_ce_loss(x, target, weight, **options)
    for padding in (-1e4, -50.0):
        padded = torch.cat([x, torch.full((2, 5, 6, 5), padding)], dim=1).requires_grad_()
        more = torch.cat([target, torch.zeros(2, 5, 6, 5)], dim=1)
        annotated = torch.tensor([True] * 3 + [False] * 5).expand(2, -1)
        loss = dice_ce_loss(padded, more, weight, annotated=annotated, **options)
        assert loss.item() == pytest.approx(plain.item(), abs=1e-6)
        loss.backward()
        assert padded.grad[:, 3:].abs().max() < 1e-6


def test_everything_annotated_changes_nothing() -> None:
    x, target, weight = logits(), onehot(labels()), torch.ones(2, 1, 6, 5)
    for options in ({}, {"regions": True}, {"batch_dice": True}):
        losses = [dice_ce_loss(x, target, weight, annotated=given, **options) for given in (None, ALL)]
        torch.testing.assert_close(*losses)


def test_sample_in_which_no_region_is_annotated() -> None:
    """No number but 0, and no division by it."""
    x, nothing = logits().requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    target, weight = (logits(3) > 0).float(), torch.ones(2, 1, 6, 5)
    assert cross_entropy(x, target, weight, regions=True, annotated=nothing) == 0
    p = x.sigmoid()
    assert soft_dice_loss(p, target, weight, skip_background=False, annotated=nothing) == 0
    dice_ce_loss(x, target, weight, regions=True, annotated=nothing).backward()
    assert x.grad.abs().max() == 0


# ------------------------------------------------------------------ labels in the file that do not count
def test_voxels_of_labels_that_do_not_count() -> None:
    """They become certain background; neighbours, other samples and the ignore label stay as they are."""
    target = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 2, 3]]])  # 3: ignore
    clean, hidden = without_unannotated(target, ONE_LESS)
    assert clean.tolist() == [[[0, 1, 0, 3]], [[0, 1, 2, 3]]]
    assert hidden.tolist() == [[[False, False, True, False]], [[False] * 4]]
    x = torch.zeros(2, 3, 4).requires_grad_()
    merged = merge_unannotated(x, ONE_LESS, hidden=hidden)
    assert merged[0].argmax(0)[2] == 0 and merged[0].softmax(0)[0, 2] == 1
    (-merged.log_softmax(1)[:, 0]).sum().backward()
    assert x.grad[0, :, 2].abs().max() == 0 and x.grad[0, 1, 1] > 0.1 and x.grad[1, 2, 2] > 0.1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_regions_that_do_not_count(dtype: torch.dtype) -> None:
    target = torch.ones(2, 4, 3, dtype=dtype)  # the last: ignore
    clean, hidden = without_unannotated(target, ONE_LESS, regions=True)
    assert clean.dtype == dtype and not hidden.any()
    assert clean[:, :, 0].tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
