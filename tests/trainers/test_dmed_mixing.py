"""Labelled and unlabelled images in one batch: which voxels count where, and what is pasted into what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_batch, ready_trainer
from torch import Tensor

from nnunet_diffext.data.loaders import PairedLoader
from nnunet_diffext.losses.segmentation import dice_ce_loss

REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}
IGNORE = {"background": 0, "ball": 1, "ignore": 2}


def losses_of(trainer: Any, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return trainer.compute_losses(batch)


def student_of(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the student learns from, mixed if the settings say so."""
    clean, valid = trainer.label_space.encode(batch["target"])
    return trainer.with_unlabeled(batch["data"], clean, valid.float(), batch["unlabeled"], trainer.mixes)


@pytest.mark.parametrize(
    ("tokens", "samples"),
    [("", 4), ("oneDirection", 2), ("noCopyPaste", 4), ("copyPaste0p5", 4), ("paper", 4)],
)
@pytest.mark.parametrize("labels", [None, IGNORE, REGIONS], ids=["softmax", "ignore", "regions"])
def test_every_voxel_is_labelled_or_pseudo_labelled(tokens: str, samples: int, labels: dict | None) -> None:
    """Image, target and weights of the student are mixed alike: a voxel's label is its image's."""
    trainer = ready_trainer(tokens, labels=labels)
    batch = make_batch(trainer)
    if labels is IGNORE:
        batch["target"][:, :, :4] = 2
    clean, valid = trainer.label_space.encode(batch["target"])
    weak, strong = trainer.views(batch["unlabeled"])
    pseudo, confidence = trainer.pseudo_labels(weak)
    student = strong if trainer.settings.strong_intensity else weak
    torch.manual_seed(0)
    image, target, labeled, unlabeled = student_of(trainer, batch)
    assert [len(x) for x in (image, target, labeled, unlabeled)] == [samples] * 4
    assert ((labeled > 0) & (unlabeled > 0)).sum() == 0
    # noise makes every image value unique: it tells where a voxel came from
    sources = [(batch["data"], clean, valid.float(), labeled), (student, pseudo, confidence, unlabeled)]
    found = torch.zeros_like(labeled, dtype=torch.bool)
    for values, targets, weights, result in sources:
        for i in range(samples):
            same = image[i] == values[i % 2]
            found[i] |= same
            assert torch.equal(target[i] * same, targets[i % 2] * same)
            assert torch.equal(result[i] * same, weights[i % 2] * same)
            assert (result[i][~same] == 0).all()
    assert found.all()


def test_without_consistency_nobody_makes_pseudo_labels() -> None:
    """The alignment still sees the unlabelled images, beside the labelled ones."""
    trainer = ready_trainer("noCACL_IEFA")
    batch = make_batch(trainer)
    _, valid = trainer.label_space.encode(batch["target"])
    image, _, labeled, pseudo = student_of(trainer, batch)
    assert torch.equal(image, torch.cat([batch["data"], trainer.views(batch["unlabeled"])[1]]))
    assert torch.equal(labeled, torch.cat([valid.float(), torch.zeros_like(labeled[2:])]))
    assert pseudo.sum() == 0 and trainer.teacher is None
    assert {"cac", "cac_experts"}.isdisjoint(losses_of(trainer, batch))


def test_copy_paste_uses_either_image_as_background() -> None:
    """The box holds 4/9 of a 2D patch; every other one is inverted, so that the shares are balanced."""
    trainer = ready_trainer("noStrong_oneDirection")
    batch = make_batch(trainer)
    shares = []
    for seed in range(6):
        torch.manual_seed(seed)
        _, _, labeled, _ = student_of(trainer, batch)
        shares.append(labeled.mean((1, 2, 3)).tolist())
    box = round(2 / 3 * 16) * round(2 / 3 * 24) / (16 * 24)
    for pair in shares:
        assert sorted(pair) == pytest.approx(sorted([box, 1 - box]), abs=1e-6)
    assert len({pair[0] > pair[1] for pair in shares}) == 2, "always the same sample is inverted"


@pytest.mark.parametrize(("share", "expected"), [("mix0", 0), ("", 40), ("mix0p25", 10)])
def test_share_of_the_steps_that_mix(share: str, expected: int) -> None:
    """In the others the labelled images stay whole."""
    trainer = ready_trainer(share)
    trainer.start_teacher()  # now, or its copy of the network would have the hook as well
    batch = make_batch(trainer)
    seen: list[Tensor] = []
    trainer.network.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    torch.manual_seed(0)
    for _ in range(40):
        trainer.compute_losses(batch)
    mixed = [not torch.equal(image[:2], batch["data"]) for image in seen]
    assert sum(mixed) == pytest.approx(expected, abs=5 if share == "mix0p25" else 0)
    assert {len(image) for image in seen} == {4}


def test_student_sees_the_strong_view_and_the_teacher_the_weak_one() -> None:
    trainer = ready_trainer("noCopyPaste")
    trainer.start_teacher()
    seen: dict[str, Tensor] = {}
    trainer.teacher.register_forward_hook(lambda _, args, __: seen.__setitem__("teacher", args[0]))
    trainer.network.register_forward_hook(lambda _, args, __: seen.__setitem__("student", args[0]))
    batch = make_batch(trainer)
    trainer.compute_losses(batch)
    assert torch.equal(seen["teacher"], batch["unlabeled"][:, :1])
    assert torch.equal(seen["student"], torch.cat([batch["data"], batch["unlabeled"][:, 1:]]))


def test_labels_of_unlabelled_cases_are_not_even_in_the_batch() -> None:
    """nnU-Net's loader makes a target for every case; the pair of streams drops it, so garbage changes no bit."""
    trainer = ready_trainer()
    batch = make_batch(trainer)
    labeled = {"data": batch["data"], "target": batch["target"]}
    results = []
    for seed in (1, 2):
        garbage = torch.randint(2, batch["target"].shape, generator=torch.Generator().manual_seed(seed))
        paired = PairedLoader(
            iter([labeled]), iter([{"data": batch["unlabeled"], "target": garbage, "keys": ["case"]}])
        )
        mixed = next(paired)
        assert set(mixed) == {"data", "target", "unlabeled", "unlabeled_keys"} and mixed["target"] is labeled["target"]
        losses = losses_of(trainer, mixed)
        trainer.optimizer.zero_grad()
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad.clone() for n, p in trainer.network.named_parameters()}))
    (losses_a, gradients_a), (losses_b, gradients_b) = results
    assert all(torch.equal(losses_a[k], losses_b[k]) for k in losses_a)
    assert all(torch.equal(gradients_a[k], gradients_b[k]) for k in gradients_a)


@pytest.mark.parametrize(
    ("tokens", "unlabeled", "planned", "pooled"),
    [
        ("", True, False, True),
        ("oneDirection", True, False, True),
        ("", False, False, False),
        ("", False, True, True),
        ("noCACL_IEFA", True, False, False),
        ("noCopyPaste", True, False, False),
        ("paper", True, True, True),
    ],
)
def test_dice_is_pooled_over_mixed_patches(tokens: str, unlabeled: bool, planned: bool, pooled: bool) -> None:
    """Of a mixed patch each image holds a piece only, often without foreground; otherwise as nnU-Net planned it."""
    trainer = ready_trainer(tokens, batch_dice=planned)
    terms: list[tuple[Tensor, ...]] = []
    whole = trainer.segmentation_loss
    trainer.segmentation_loss = lambda *args, **pool: terms.append(args) or whole(*args, **pool)
    batch = make_batch(trainer, unlabeled=unlabeled)
    batch["target"][0] = 0
    batch["target"][0, 0, 0, 0] = 1
    sup = losses_of(trainer, batch)["sup"]
    by_pool = {pool: dice_ce_loss(*terms[0], batch_dice=pool).item() for pool in (False, True)}
    assert abs(by_pool[False] - by_pool[True]) > 1e-3
    assert sup.item() == pytest.approx(by_pool[pooled], rel=1e-5)
