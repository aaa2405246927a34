"""Segmentation losses on dense targets with a weight per voxel: one pair of functions for labels and pseudo-labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

_NONE = -1e4
"""Logit of a head that cannot be predicted: probability 0, and finite in half precision."""


def without_unannotated(target: Tensor, annotated: Tensor, *, regions: bool = False) -> tuple[Tensor, Tensor]:
    """A target without labels that count as not annotated, although the file holds them: nobody vouches for them.

    Args:
        target: as nnU-Net gives it, ``(B, 1, *)``; regions: ``(B, C, *)``.
        annotated: bool ``(B, K)``.
        regions: heads are independent (sigmoid).
    Returns:
        target with background in place of them; where they were, bool ``(B, 1, *)``. Regions: with empty masks in
        place of them, and nowhere.
    """
    heads = annotated.shape[1]
    if regions:
        known = annotated.view(*annotated.shape, *(1,) * (target.ndim - 2))
        masks = target[:, :heads]
        target = torch.cat([torch.where(known, masks, torch.zeros_like(masks)), target[:, heads:]], dim=1)
        return target, torch.zeros_like(target[:, :1], dtype=torch.bool)
    label = target.long().clamp(0, heads - 1)
    hidden = ~annotated.gather(1, label.flatten(1)).view(target.shape) & (label == target)  # not the ignore label
    return target.masked_fill(hidden, 0), hidden


def merge_unannotated(
    logits: Tensor, annotated: Tensor, *, regions: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """Logits of "background, or what nobody looked for here": the probabilities of heads that are not annotated in a
    sample go to its background (Shi et al., "Marginal loss and exclusion loss", MedIA 2021). Region heads are silenced.

    Args:
        logits: ``(B, K, *)``.
        annotated: bool ``(B, K)``; softmax heads: the background, head 0, always is.
        regions: heads are independent (sigmoid).
        hidden: bool ``(B, 1, *)``, see :func:`without_unannotated`: there, background is certain, so that nothing is
            learned or counted.
    Returns:
        logits ``(B, K, *)``, float32.
    """
    unknown = ~annotated.view(*annotated.shape, *(1,) * (logits.ndim - 2))
    if regions:
        return logits.float().masked_fill(unknown, _NONE)
    logits = log_softmax(logits.float(), dim=1)  # else logits below _NONE would lose against what is out of question
    rest = logits.masked_fill(unknown, _NONE)
    unknown = unknown.clone()
    unknown[:, 0] = True
    background = logits.masked_fill(~unknown, _NONE).logsumexp(1, keepdim=True)
    if hidden is not None:
        background, rest = background.masked_fill(hidden, 0.0), rest.masked_fill(hidden, _NONE)
    return torch.cat([background, rest[:, 1:]], dim=1)


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor, *, regions: bool = False, annotated: Tensor | None = None
) -> Tensor:
    """Weighted mean of the voxel-wise (regions: binary) cross-entropy, ``sum(w ce) / sum(w)``; 0 without weight.

    Args:
        logits: ``(B, K, *)``.
        target: probabilities or one-hot, ``(B, K, *)``.
        weight: ``(B, 1, *)``, non-negative.
        regions: heads are independent (sigmoid).
        annotated: bool ``(B, K)``, of regions: the mean is over these heads.
    """
    if regions:
        voxelwise = binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
        if annotated is not None:
            share = annotated.float() / annotated.float().mean(1, keepdim=True).clamp_min(1e-5)
            voxelwise = voxelwise * share.view(*share.shape, *(1,) * (voxelwise.ndim - 2))
        voxelwise = voxelwise.mean(1, keepdim=True)
    else:
        voxelwise = -(target * log_softmax(logits.float(), dim=1)).sum(1, keepdim=True)
    return (weight * voxelwise).sum() / weight.sum().clamp_min(1e-5)


def soft_dice_loss(
    probabilities: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    skip_background: bool,
    batch_dice: bool = False,
    smooth: float = 1e-5,
    annotated: Tensor | None = None,
) -> Tensor:
    """``1 - mean Dice``; the weight enters intersection and cardinalities. A sample without weight does not count.

    Args:
        probabilities, target: ``(B, K, *)``.
        weight: ``(B, 1, *)``, non-negative.
        skip_background: leave out channel 0 (softmax heads).
        batch_dice: pool the sums over the batch of this process, as nnU-Net does for small patches.
        smooth: added to numerator and denominator.
        annotated: bool ``(B, K)``; other heads of a sample do not count either.
    """
    first = int(skip_background)
    probabilities, target = probabilities[:, first:], target[:, first:]
    axes = tuple(range(2, target.ndim))
    intersection = (weight * probabilities * target).sum(axes)
    cardinality = (weight * (probabilities + target)).sum(axes)
    counts = weight.sum(axes) > 0  # (B, 1)
    if annotated is not None:
        counts = counts & annotated[:, first:]
        intersection, cardinality = intersection * counts, cardinality * counts
    if batch_dice:
        intersection, cardinality, counts = intersection.sum(0), cardinality.sum(0), counts.any(0)
    dice = (2 * intersection + smooth) / (cardinality + smooth).clamp_min(1e-8)
    counts = counts.expand_as(dice).to(dice.dtype)
    return ((1 - dice) * counts).sum() / counts.sum().clamp_min(1)


def dice_ce_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    regions: bool = False,
    batch_dice: bool = False,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    annotated: Tensor | None = None,
) -> Tensor:
    """``L_seg``: cross-entropy plus Dice, computed in fp32 (DMED-Seg section 4.2). 0 if no voxel has weight.

    Args:
        logits: ``(B, K, *)``.
        target: ``(B, K, *)``; weight: ``(B, 1, *)``.
        regions: sigmoid heads, all of them foreground.
        batch_dice: see :func:`soft_dice_loss`.
        dice_weight, ce_weight: of its two parts (TextDiffSeg eq. 4: gamma; Swin-UNet: 0.6 and 0.4).
        annotated: bool ``(B, K)``, default all; see :func:`merge_unannotated`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, target, weight = logits.float(), target.float(), weight.float()
        if annotated is not None:
            logits = merge_unannotated(logits, annotated, regions=regions)
        probabilities = torch.sigmoid(logits) if regions else torch.softmax(logits, dim=1)
        dice = soft_dice_loss(
            probabilities, target, weight, skip_background=not regions, batch_dice=batch_dice, annotated=annotated
        )
        ce = cross_entropy(logits, target, weight, regions=regions, annotated=annotated)
        return dice_weight * dice + ce_weight * ce
