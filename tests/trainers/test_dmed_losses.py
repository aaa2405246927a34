"""What one batch contributes: which voxels count where, with what weight, and what carries no gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import KINDS, make_batch, make_trainer, ready_trainer
from torch import Tensor

REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}
IGNORE = {"background": 0, "ball": 1, "ignore": 2}


def losses_of(trainer: Any, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return trainer.compute_losses(batch)


def at_progress(trainer: Any, progress: float) -> None:
    """Pretend that this share of the training is done."""
    trainer.current_epoch = round(progress * trainer.num_epochs)


# ------------------------------------------------------------------ names and weights
EXPECTED = {
    "": {"sup", "sup_experts", "cac", "cac_experts", "diffusion"},
    "IEFA": {"sup", "sup_experts", "cac", "cac_experts", "iefa", "diffusion"},
    "noCACL_IEFA": {"sup", "sup_experts", "iefa", "diffusion"},
    "noCACL": {"sup", "sup_experts", "diffusion"},
    "TOnly": {"sup", "sup_experts", "cac", "cac_experts"},
    "CEonly": {"sup", "sup_experts", "cac", "cac_experts"},
    "DEonly": {"sup", "sup_experts", "cac", "cac_experts", "diffusion"},
    "fixedAverage": {"sup", "sup_experts", "diffusion"},
}


@pytest.mark.parametrize("kind", ["2d", "3d-aniso"])
@pytest.mark.parametrize("tokens", EXPECTED)
def test_terms(tokens: str, kind: str) -> None:
    trainer = ready_trainer(tokens, kind)
    losses = losses_of(trainer, make_batch(trainer))
    assert set(losses) == EXPECTED[tokens]
    assert all(loss.ndim == 0 and torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    if tokens in ("CEonly", "DEonly"):
        assert losses["sup_experts"] == losses["cac_experts"] == 0, "a single expert's loss must not count twice"


@pytest.mark.parametrize("tokens", ["", "paper", "CEonly"])
def test_labelled_batch_has_no_consistency_terms(tokens: str) -> None:
    trainer = ready_trainer(tokens)
    assert not {"cac", "cac_experts"} & set(losses_of(trainer, make_batch(trainer, unlabeled=False)))


def test_weights_of_the_terms() -> None:
    """lambda_cac exp(-5) at the start, lambda_cac behind the ramp; the others constant."""
    trainer = make_trainer("100epochs_10iters_cac1p5_iefa0p2_expert0p25_diffusion0p75_ramp0p5")
    start = trainer.loss_weights()
    assert start["cac"] == pytest.approx(1.5 * math.exp(-5))
    constant = {"iefa": 0.2, "sup_experts": 0.25, "diffusion": 0.75}
    for progress, ramp in ((0.25, math.exp(-5 / 4)), (0.5, 1.0), (0.99, 1.0)):
        at_progress(trainer, progress)
        weights = trainer.loss_weights()
        assert weights["cac"] == pytest.approx(1.5 * ramp)
        assert weights["cac_experts"] == pytest.approx(0.25 * weights["cac"])
        assert {k: weights[k] for k in constant} == constant
    assert "sup" not in start  # weight one: eq. 5


def test_ramp_moves_within_an_epoch_and_ends_where_the_settings_say() -> None:
    trainer = ready_trainer("1epochs_4iters_ramp0p5")
    seen = []
    for _ in range(4):
        seen.append(trainer.loss_weights()["cac"])
        trainer.train_step(make_batch(trainer))
    assert seen == pytest.approx([math.exp(-5), math.exp(-5 / 4), 1.0, 1.0])


@pytest.mark.parametrize("tokens", ["", "eq4", "paper", "CEonly"])
def test_total_is_the_weighted_sum(tokens: str) -> None:
    trainer = ready_trainer(tokens)
    at_progress(trainer, 0.1)
    weights = trainer.loss_weights()
    report = trainer.train_step(make_batch(trainer))
    total = report.pop("loss")
    assert float(total) == pytest.approx(sum(weights.get(k, 1.0) * float(v) for k, v in report.items()), rel=1e-5)


# ------------------------------------------------------------------ pseudo-labels
@pytest.mark.parametrize("tokens", ["", "noEMA", "threshold0p3"])
@pytest.mark.parametrize("labels", [None, REGIONS], ids=["softmax", "regions"])
def test_pseudo_labels_are_constants(tokens: str, labels: dict | None) -> None:
    trainer = ready_trainer(tokens, labels=labels)
    onehot, confidence = trainer.pseudo_labels(make_batch(trainer)["data"])
    assert not onehot.requires_grad and not confidence.requires_grad
    assert trainer.network.training, "the network was left in evaluation mode"
    assert set(onehot.unique().tolist()) <= {0.0, 1.0}
    assert confidence.shape == (2, 1, *KINDS["2d"].patch)
    assert 0 <= confidence.min() and confidence.max() <= 1
    if labels is None:
        assert (onehot.sum(1) == 1).all()
    if tokens == "threshold0p3":
        assert set(confidence.unique().tolist()) <= {0.0, 1.0}
    else:
        assert len(confidence.unique()) > 100


def test_confidence_is_one_minus_the_normalised_entropy_of_the_fused_prediction() -> None:
    trainer = ready_trainer("noEMA", labels={"background": 0, "a": 1, "b": 2})
    image = make_batch(trainer)["data"]
    onehot, confidence = trainer.pseudo_labels(image)
    with torch.no_grad():
        p = trainer.network.eval()(image).softmax(1)
    expected = 1 + (p * p.log()).sum(1, keepdim=True) / math.log(3)
    torch.testing.assert_close(confidence, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(onehot.argmax(1), p.argmax(1))


def test_no_gradient_through_confidence_and_pseudo_labels() -> None:
    """The gradient equals that of the same loss, written out with confidence and labels as literal numbers."""
    trainer = ready_trainer("noEMA_noCopyPaste_noStrong_TOnly_coupled", labels=IGNORE)
    batch = unlabelled_alone(trainer)
    loss = losses_of(trainer, batch)["cac"]
    loss.backward()
    got = {n: p.grad.clone() for n, p in trainer.network.named_parameters()}
    trainer.optimizer.zero_grad()

    weak = batch["unlabeled"][:, :1]
    with torch.no_grad():
        p = trainer.network.eval()(weak).softmax(1)
    trainer.network.train()
    confidence = (1 + (p * p.log()).sum(1) / math.log(2)).tolist()
    labels = p.argmax(1).tolist()
    torch.manual_seed(3)
    fused = trainer.network(torch.cat([batch["data"], weak])).fused[2:]
    c, y = torch.tensor(confidence), torch.nn.functional.one_hot(torch.tensor(labels), 2).movedim(-1, 1)
    ce = (c * -(y * fused.log_softmax(1)).sum(1)).sum() / c.sum()
    q, y = fused.softmax(1)[:, 1], y[:, 1]
    axes = tuple(range(1, q.ndim))
    dice = (2 * (c * q * y).sum(axes) + 1e-5) / ((c * (q + y)).sum(axes) + 1e-5)  # the labelled samples do not count
    expected = ce + 1 - dice.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, p in trainer.network.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


def unlabelled_alone(trainer: Any) -> dict[str, Tensor]:
    """A batch in which no labelled voxel counts: all of them carry the ignore label."""
    batch = make_batch(trainer)
    batch["target"] = torch.full_like(batch["target"], 2)
    return batch


@pytest.mark.parametrize("tokens", ["noEMA_noCopyPaste_noStrong", "noEMA_noCopyPaste_noStrong_paper"])
def test_a_step_on_unlabelled_images_does_not_lower_the_confidence(tokens: str) -> None:
    """Less confidence everywhere would lower eq. 2 as printed, if C carried a gradient: METHODS 2.5-2."""
    trainer = ready_trainer(tokens, labels=IGNORE)
    batch = unlabelled_alone(trainer)
    losses = losses_of(trainer, batch)
    assert losses["sup"] == losses["sup_experts"] == losses["diffusion"] == 0
    weak, _ = trainer.views(batch["unlabeled"])
    _, before = trainer.pseudo_labels(weak)
    (losses["cac"] + losses["cac_experts"]).backward()
    trainer.optimizer.step()
    _, after = trainer.pseudo_labels(weak)
    assert after.mean() > before.mean()


def test_no_voxel_above_the_threshold() -> None:
    trainer = ready_trainer("threshold1_noCopyPaste", labels=IGNORE)
    losses = losses_of(trainer, unlabelled_alone(trainer))
    assert losses["cac"] == 0 and losses["cac_experts"] == 0
    sum(losses.values()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trainer.network.parameters())


def test_threshold_counts_confident_voxels_without_weighing_them() -> None:
    low, none, high = (ready_trainer(f"noEMA_{t}") for t in ("threshold0", "threshold1", "threshold0p1"))
    image = make_batch(low)["data"]
    shares = [float(t.pseudo_labels(image)[1].mean()) for t in (low, high, none)]
    assert shares[0] == 1 > shares[1] > shares[2] == 0


def test_ignored_voxels_do_not_matter() -> None:
    """Their label value is the ignore label whatever lies beneath; the image there still takes part."""
    trainer = ready_trainer("noCACL", labels=IGNORE)
    batch = make_batch(trainer, unlabeled=False)
    batch["target"][:, :, :8] = 2
    out = trainer.label_space.encode(batch["target"])
    assert (out[0][:, :, :8] == 0).all() and not out[1][:, :, :8].any()
    losses = losses_of(trainer, batch)
    assert all(torch.isfinite(v) for v in losses.values()) and losses["sup"] > 0


@pytest.mark.parametrize(
    "labels", [None, REGIONS, IGNORE, {**REGIONS, "ignore": 3}], ids=["softmax", "regions", "ignore", "both"]
)
@pytest.mark.parametrize("batch_dice", [False, True])
def test_validation_loss_takes_nnunets_targets(labels: dict | None, batch_dice: bool) -> None:
    """nnU-Net's ``validation_step`` calls ``self.loss(output, target)``."""
    trainer = ready_trainer(labels=labels, batch_dice=batch_dice)
    batch = make_batch(trainer)
    with torch.no_grad():
        logits = trainer.network.eval()(batch["data"])
    onehot, valid = trainer.label_space.encode(batch["target"])
    value = trainer.loss(logits, batch["target"])
    assert torch.equal(value, trainer.segmentation_loss(logits, onehot, valid)) and value > 0
    flipped = trainer.label_space.num_heads - 1 - batch["target"] if labels is None else ~batch["target"].bool()
    if labels is not IGNORE:
        assert trainer.loss(logits, flipped.to(batch["target"].dtype)) != value


def test_diffusion_pass_uses_labelled_images_only() -> None:
    """As many labels as in the paper's batch: half of them, rounded up, and every sample has its turn."""
    trainer = ready_trainer()
    seen: list[dict[str, Tensor]] = []
    trainer.network.register_forward_hook(lambda _, __, kwargs, ___: seen.append(kwargs), with_kwargs=True)
    for size in (1, 2, 3):
        batch = make_batch(trainer, batch=size)
        turns = set()
        for _ in range(12):
            trainer.compute_losses(batch)
            chosen = [int((batch["data"] == x).flatten(1).all(1).nonzero()) for x in seen[-1]["clean_image"]]
            assert len(set(chosen)) == (size + 1) // 2
            assert torch.equal(seen[-1]["clean"].argmax(1, keepdim=True), batch["target"][chosen].long())
            assert seen[-1]["leaky"] is None
            turns.update(chosen)
        assert turns == set(range(size))


def test_uncertain_locations_weigh_more_in_the_alignment() -> None:
    plain, weighted = ready_trainer("IEFA"), ready_trainer("iefaUncertain")
    batch = make_batch(plain)
    weighted.network.load_state_dict(plain.network.state_dict())
    a, b = losses_of(plain, batch), losses_of(weighted, batch)
    assert torch.equal(a["sup"], b["sup"]) and not torch.equal(a["iefa"], b["iefa"])
    out = weighted.network(batch["data"])
    weight = weighted.uncertainty_at(out)
    assert weight.shape == (2, 1, *out.embeddings[0].shape[2:]) and not weight.requires_grad
    p = out.fused.softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True) / math.log(2)
    torch.testing.assert_close(weight, torch.nn.functional.avg_pool2d(entropy, 4), atol=1e-5, rtol=1e-4)
