"""PGRD's trainer: what is trained, by what, and what a validation costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from tiny import Kind, make_batch, make_trainer, parameters_of
from tiny_pgrd import shaken
from tiny_prior import save_prior
from torch import nn

from nnunet_diffext.losses.diffusion import deep_diffusion_supervision, masked_error
from nnunet_diffext.settings import SettingsError
from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.pgrd import PGRDSettings

FLAT = Kind((16, 16), ((1, 1), (2, 2)), features=(4, 8))
TOKENS = ("", "noPGR", "noDDS", "eps", "vanillaDDPM", "TOnly", "x0", "hardPrior", "literalEq10", "paper")


def pgrd(tokens: str = "", kind: str | Kind = FLAT, **options: Any) -> Any:
    """A trainer around an untrained prior, in training mode."""
    save_prior(kind=kind, **options)
    trainer = make_trainer(tokens, kind, base="PGRDTrainer", **options)
    trainer.initialize()
    trainer.network.train()
    return trainer


def batch_of(trainer: Any, seed: int = 0) -> dict[str, Any]:
    return make_batch(trainer, unlabeled=False, seed=seed)


def without_effect(net: nn.Module) -> set[str]:
    """A bias that the instance norm behind it removes."""
    return {f"{name}.conv.bias" for name, m in net.named_modules() if isinstance(m, ConvDropoutNormReLU)}


def reached(trainer: Any, steps: int) -> None:
    """Every trainable parameter has a gradient, as DDP demands, and none of the prior's moves. The heads' last layers
    start at zero, so what is before them would learn from the second step on.
    """
    shaken(trainer.module)
    prior = parameters_of(trainer.network.prior) if trainer.network.prior is not None else {}
    for step in range(steps):
        report = trainer.train_step(batch_of(trainer, step))
    assert torch.isfinite(torch.tensor(float(report["loss"])))
    trained = {n: p for n, p in trainer.network.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    dead = {n for n, p in trained.items() if p.grad.abs().max() < 1e-8}
    assert dead - without_effect(trainer.network) == set()
    assert not any(n.startswith("prior.") for n in trained)
    if prior:
        assert all(torch.equal(p, prior[n]) for n, p in trainer.network.prior.named_parameters())
        assert not trainer.network.prior.training and trainer.network.training


@pytest.mark.parametrize("tokens", TOKENS)
def test_one_step_reaches_every_parameter(tokens: str) -> None:
    reached(pgrd(tokens), steps=1)


@pytest.mark.parametrize("tokens", ["warmup0", "noPGR_warmup0"])
@pytest.mark.parametrize("kind", ["3d-aniso", "3d-aniso-resenc"])
def test_in_3d(kind: str, tokens: str) -> None:
    """The last norm of a residual block starts at zero, so its convolutions learn from the second step on; how fast,
    the first step decides, which the warm-up would make tiny.
    """
    reached(pgrd(tokens, kind), steps=2)


def test_regions_with_ignore_label() -> None:
    trainer = pgrd(labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    assert trainer.label_space.target_channels == 3
    reached(trainer, steps=1)


def test_nothing_is_learned_from_ignored_voxels() -> None:
    """Whatever label stands where nobody looked, losses and gradients are the same."""
    trainer = pgrd(labels={"background": 0, "ball": 1, "ignore": 2})
    gradients = []
    for images in (0.0, 1.0):
        batch = batch_of(trainer)
        batch["target"][:, :, 4:] = 2
        trainer.optimizer.zero_grad()
        torch.manual_seed(3)
        clean, valid = trainer.label_space.encode(batch["target"])
        out = trainer.network(batch["data"], clean=torch.where(valid, clean, images), valid=valid)
        loss = masked_error(out.prediction, out.target, valid) + deep_diffusion_supervision(out.heads, clean, valid)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_losses_and_their_weights() -> None:
    trainer = pgrd("dds0p3")
    losses = trainer.compute_losses(batch_of(trainer))
    assert losses.keys() == {"velocity", "dds"} and trainer.loss_weights() == {"dds": 0.3}
    assert pgrd("noDDS").compute_losses(batch_of(trainer)).keys() == {"velocity"}


def test_supervision_up_to_a_share_of_t() -> None:
    """The set of eq. 6: at t = T alone nothing is left of it."""
    trainer = pgrd("ddsUntil0p5_TOnly")
    assert float(trainer.compute_losses(batch_of(trainer))["dds"]) == 0
    assert float(pgrd("TOnly").compute_losses(batch_of(trainer))["dds"]) > 0


def test_losses_by_hand() -> None:
    prediction, target = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    target[0, :, 0, 0] = 3.0
    valid = torch.tensor([[1, 1], [0, 1]]).view(1, 1, 2, 2).bool()
    assert float(masked_error(prediction, target, valid)) == pytest.approx((9 + 1 + 1) / 3)
    assert float(masked_error(prediction, target, torch.zeros_like(valid))) == 0
    clean = torch.zeros(1, 2, 2, 2)
    clean[0, 0] = 1
    clean[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    clean *= valid
    fine, coarse = torch.zeros(1, 2, 2, 2), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    expected_coarse = -(2 / 3 * coarse.log_softmax(1)[0, 0] + 1 / 3 * coarse.log_softmax(1)[0, 1])
    expected = (torch.tensor(2.0).log() + 0.5 * expected_coarse) / 1.5
    assert float(deep_diffusion_supervision([fine, coarse], clean, valid)) == pytest.approx(float(expected))


def test_warm_up_and_decay() -> None:
    trainer = pgrd("warmup4_10iters_2epochs_lr1e-3")
    seen: list[float] = []
    plain = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: seen.append(trainer.optimizer.param_groups[0]["lr"]) or plain(*a, **k)
    for step in range(6):
        trainer._steps_this_epoch = step
        trainer.train_step(batch_of(trainer))
    assert seen == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    trainer.lr_scheduler.step(1)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**0.9)


@pytest.mark.parametrize("tokens", ["", "20steps_3samples", "vanillaDDPM", "paper"])
def test_validation_step_costs_one_pass(tokens: str) -> None:
    """50 of them per epoch: with the samples of a prediction, they would take longer than the training."""
    trainer = pgrd(tokens)
    counts: Counter[str] = Counter()
    for name in ("context_net", "step_net"):
        getattr(trainer.network, name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    sampling = trainer.network.sampling
    trainer.network.eval()
    with torch.no_grad():
        result = trainer.validation_step(batch_of(trainer))
    assert counts == {"context_net": 1, "step_net": 1}
    assert torch.isfinite(torch.tensor(float(result["loss"])))
    assert trainer.network.sampling is sampling


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("levels0", "readout 'heads' needs levels"), ("T10_20steps", "steps=20 is more than the schedule has")],
)
def test_contradictory_settings(tokens: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_trainer(f"PGRDTrainer_{tokens}")


def test_eps_needs_a_schedule_that_keeps_some_signal() -> None:
    with pytest.raises(SettingsError, match="use the token 'eps', which sets both"):
        PGRDSettings(kind="eps")


def test_wrong_readout_in_the_plans_is_refused() -> None:
    with pytest.raises(SettingsError, match="readout must be one of .*'heads'"):
        PGRDSettings(readout="argmax")
