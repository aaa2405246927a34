"""The average of all weights: what is validated, saved and predicted with, while training goes on beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import make_batch, make_trainer, ready_trainer
from tiny_latent import FLAT
from tiny_prior import finish
from torch import Tensor, nn

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.stages import FINAL

TOKENS = "randomText_warmup0_2steps_stride2"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def empty_folders(nnunet_folders: dict[str, Path]) -> None:
    """nnU-Net's folders of one test."""


def trained(tokens: str = "ema0p9", steps: int = 3) -> Any:
    """A trainer after a few steps, whose average has started before the first one."""
    trainer = ready_trainer(f"{TOKENS}_{tokens}", FLAT, base="TextDiffSegTrainer")
    if trainer.settings.ema_decay:
        trainer.start_teacher()
    advance(trainer, range(steps))
    return trainer


def advance(trainer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        trainer._steps_this_epoch = step
        losses.append(float(trainer.train_step(make_batch(trainer, unlabeled=False, seed=step))["loss"]))
    return losses


def state_of(module: nn.Module) -> State:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------ the average
def test_everything_is_averaged() -> None:
    """An averaged denoiser would meet features that it was never trained on."""
    trainer = trained("ema0p9", steps=0)
    mean = {k: v.clone() for k, v in trainer.network.named_parameters()}
    for step in range(100):
        advance(trainer, range(step, step + 1))
        decay = min((1 + step) / (10 + step), 0.9)
        mean = {k: decay * mean[k] + (1 - decay) * v.detach() for k, v in trainer.network.named_parameters()}
    for name, value in trainer.teacher.named_parameters():
        torch.testing.assert_close(value, mean[name], atol=1e-6, rtol=1e-4)
    moved = {n.split(".")[0] for n, p in trainer.network.named_parameters() if not torch.equal(p, mean[n])}
    assert moved == {"codec", "encoder", "text", "to_condition", "denoiser"}


def test_first_average_starts_with_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    for tokens, starts in (("ema0p9", True), ("noEMA", False)):
        trainer = ready_trainer(f"{TOKENS}_{tokens}", FLAT, base="TextDiffSegTrainer")
        assert trainer.teacher is None
        trainer.on_train_start()
        assert (trainer.teacher is not None) == starts
        first = trainer.teacher
        trainer.on_train_start()
        assert trainer.teacher is first, "a checkpoint's average was thrown away"


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_exchanged_and_put_back(fails: bool) -> None:
    trainer = trained()
    own, mean = state_of(trainer.network), state_of(trainer.teacher)
    assert not same(own, mean)
    try:
        with trainer.averaged_weights():
            assert same(state_of(trainer.network), mean) and same(state_of(trainer.teacher), own)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same(state_of(trainer.network), own) and same(state_of(trainer.teacher), mean)


def test_optimiser_keeps_its_parameters() -> None:
    """Training after a validation is the training without one."""
    plain, interrupted = trained(), trained()
    with interrupted.averaged_weights():
        interrupted.network.eval()(make_batch(interrupted)["data"])
    interrupted.network.train()
    assert advance(plain, range(3, 6)) == advance(interrupted, range(3, 6))
    assert same(state_of(plain.network), state_of(interrupted.network))
    assert same(state_of(plain.teacher), state_of(interrupted.teacher))


# ------------------------------------------------------------------ validated
@pytest.mark.parametrize("tokens", ["ema0p9", "noEMA"])
def test_average_is_validated(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tokens)
    own = state_of(trainer.network)
    wanted = own if trainer.teacher is None else state_of(trainer.teacher)
    seen: list[State] = []
    trainer.network.register_forward_hook(lambda net, *_: seen.append(state_of(net)))
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(make_batch(trainer, unlabeled=False))
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, _: seen.append(state_of(self.network)))
    trainer.perform_actual_validation()
    assert len(seen) == 2 and all(same(s, wanted) for s in seen)
    assert same(state_of(trainer.network), own)


def test_validation_step_costs_one_prediction() -> None:
    trainer = trained()
    calls: list[int] = []
    trainer.network.denoiser.register_forward_hook(lambda *_: calls.append(1))
    trainer.network.eval()
    with torch.no_grad():
        trainer.validation_step(make_batch(trainer, unlabeled=False))
    assert len(calls) == trainer.settings.steps == 2


# ------------------------------------------------------------------ saved and restored
def test_average_is_what_a_checkpoint_predicts_with() -> None:
    trainer = trained()
    own, mean = state_of(trainer.network), state_of(trainer.teacher)
    saved = read_safely(finish(trainer) / "fold_0" / FINAL)
    assert same(saved["network_weights"], mean) and same(saved["diffext_teacher"], own)
    assert same(state_of(trainer.network), own), "saving changed the training"


def test_without_average() -> None:
    trainer = trained("noEMA")
    saved = read_safely(finish(trainer) / "fold_0" / FINAL)
    assert trainer.teacher is None and "diffext_teacher" not in saved
    assert same(saved["network_weights"], state_of(trainer.network))


@pytest.mark.parametrize("tokens", ["ema0p9", "noEMA"])
def test_resumed_training_goes_on_exactly(tokens: str) -> None:
    trainer = trained(tokens)
    file = str(finish(trainer) / "fold_0" / FINAL)
    resumed = make_trainer(f"{TOKENS}_{tokens}", FLAT, base="TextDiffSegTrainer")
    torch.manual_seed(77)
    resumed.load_checkpoint(file)
    resumed.network.train()
    assert same(state_of(resumed.network), state_of(trainer.network))
    if tokens == "noEMA":
        assert resumed.teacher is None
    else:
        assert same(state_of(resumed.teacher), state_of(trainer.teacher))
        assert not any(p.requires_grad for p in resumed.teacher.parameters()) and not resumed.teacher.training
        assert all(p.requires_grad for p in resumed.network.parameters())
    resumed.current_epoch = trainer.current_epoch  # finish() saves in the middle of an epoch
    assert advance(resumed, range(3, 6)) == advance(trainer, range(3, 6))
    assert same(state_of(resumed.network), state_of(trainer.network))
    if tokens != "noEMA":
        assert same(state_of(resumed.teacher), state_of(trainer.teacher))
