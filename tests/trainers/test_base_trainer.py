"""What every method inherits: skipped steps, the EMA teacher, checkpoints."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import Kind, make_batch, make_plans, make_trainer, parameters_of, ready_trainer
from torch import Tensor

from nnunet_diffext.checkpoints import CheckpointError, read_safely
from nnunet_diffext.trainers import base, find_trainer


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def an_epoch(trainer: Any) -> None:
    """The parts of nnU-Net's epoch that fill its logger, with real numbers."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(make_batch(trainer, seed=s)) for s in range(2)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        batch = make_batch(trainer)
        trainer.on_validation_epoch_end([trainer.validation_step({"data": batch["data"], "target": batch["target"]})])


# ------------------------------------------------------------------ before training
def test_patch_that_does_not_fit_is_refused_before_any_work() -> None:
    trainer = make_trainer("", Kind((18, 24), ((1, 1), (2, 2), (2, 2))))
    with pytest.raises(ValueError, match=r"Patch size \[18, 24\] is not divisible.*\[16, 24\]"):
        trainer.initialize()
    assert trainer.network is None


def test_wrong_setting_in_the_plans_is_refused() -> None:
    plans = make_plans("2d")
    plans["diffext"] = {"DMEDSegTrainer": {"lambda_cacl": 1.0}}
    with pytest.raises(ValueError, match=r"Unknown setting\(s\) \['lambda_cacl'\].*lambda_cac, "):
        make_trainer(plans=plans)


def test_no_deep_supervision_anywhere() -> None:
    trainer = ready_trainer()
    assert trainer.enable_deep_supervision is False
    trainer.set_deep_supervision_enabled(True)
    assert isinstance(trainer.network.eval()(make_batch(trainer)["data"]), Tensor)


@pytest.mark.parametrize("kind", ["2d", "3d-aniso"])
def test_bfloat16_only_on_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for tokens, mixed in (("", False), ("bf16", True)):
        with ready_trainer(tokens, kind).autocast():
            assert torch.is_autocast_enabled("cpu") == mixed


def test_bfloat16_is_refused_where_it_is_wrong_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work: a stage of two slices, a processor that only emulates it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    with pytest.raises(ValueError, match=r"'bf16'.*two slices \(depths \[8, 4, 2\]\).*Leave the token out"):
        make_trainer("bf16", "3d").initialize()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="'bf16'.*does not compute bfloat16 natively"):
        make_trainer("bf16", "2d").initialize()


# ------------------------------------------------------------------ non-finite steps
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_step_is_skipped_and_counted(poison: float) -> None:
    trainer = ready_trainer()
    trainer.train_step(make_batch(trainer))
    before, momentum = parameters_of(trainer.network), pickle.dumps(trainer.optimizer.state_dict()["state"])
    batch = make_batch(trainer)
    batch["data"][0, 0, 3, 3] = poison
    trainer.train_step(batch)
    assert equal(parameters_of(trainer.network), before)
    assert pickle.dumps(trainer.optimizer.state_dict()["state"]) == momentum
    assert (trainer.bad_steps, trainer.bad_steps_in_a_row) == (1, 1)
    trainer.train_step(make_batch(trainer))
    assert (trainer.bad_steps, trainer.bad_steps_in_a_row) == (1, 0)
    assert not equal(parameters_of(trainer.network), before)
    assert all(torch.isfinite(p).all() for p in trainer.teacher.parameters())


def test_training_that_cannot_recover_is_given_up() -> None:
    trainer = ready_trainer("CEonly")
    batch = make_batch(trainer, unlabeled=False)
    batch["data"][:] = torch.nan
    for _ in range(base.MAX_BAD_STEPS - 1):
        trainer.train_step(batch)
    with pytest.raises(FloatingPointError, match="50 steps in a row.*'sup': nan.*token lr1e-03.*fold_0"):
        trainer.train_step(batch)


# ------------------------------------------------------------------ EMA teacher
def test_teacher_equals_the_student_at_the_start() -> None:
    trainer = ready_trainer()
    student = trainer.network.state_dict()
    teacher = trainer.start_teacher()
    assert equal(teacher.state_dict(), student)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in trainer.network.parameters()}
    assert shared == set()


def test_teacher_moves_by_the_formula() -> None:
    """``d teacher + (1 - d) student`` with ``d = min(1 - 1 / (step + 2), ema_decay)``, steps counted from 0."""
    trainer = ready_trainer("ema0p7_1epochs_10iters_lr1e-1")
    expected = {k: v.double() for k, v in trainer.network.state_dict().items()}
    for decay in (1 / 2, 2 / 3, 0.7, 0.7):
        trainer.train_step(make_batch(trainer))
        student = trainer.network.state_dict()
        expected = {k: decay * expected[k] + (1 - decay) * student[k].double() for k in expected}
        for name, value in trainer.teacher.state_dict().items():
            torch.testing.assert_close(value, expected[name].float(), atol=1e-6, rtol=1e-5)
    assert not equal(trainer.teacher.state_dict(), trainer.network.state_dict())


def test_teacher_stays_outside_of_the_network() -> None:
    trainer = ready_trainer()
    keys = set(trainer.network.state_dict())
    trainer.train_step(make_batch(trainer))
    assert trainer.teacher is not None
    assert set(trainer.network.state_dict()) == keys
    optimised = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert not optimised & {id(p) for p in trainer.teacher.parameters()}
    assert all(p.grad is None for p in trainer.teacher.parameters())


@pytest.mark.parametrize(("tokens", "unlabeled"), [("noEMA", True), ("", False), ("noCACL", True)])
def test_no_teacher_where_nobody_asks_it(tokens: str, unlabeled: bool) -> None:
    trainer = ready_trainer(tokens)
    trainer.train_step(make_batch(trainer, unlabeled=unlabeled))
    assert trainer.teacher is None


# ------------------------------------------------------------------ checkpoints
def test_round_trip(tmp_path: Path) -> None:
    """Same network, optimiser, teacher, counters and random numbers, hence the same next step."""
    file = str(tmp_path / "checkpoint_latest.pth")
    trainer = ready_trainer("5epochs_2iters")
    an_epoch(trainer)
    trainer.bad_steps = 3
    trainer.save_checkpoint(file)
    trainer.on_epoch_end = None  # nnU-Net counts the epoch in the checkpoint already
    trainer.current_epoch += 1
    trainer.on_train_epoch_start()
    report = trainer.train_step(make_batch(trainer, seed=9))

    resumed = make_trainer("5epochs_2iters")
    resumed.load_checkpoint(file)
    assert resumed.current_epoch == 1 and resumed.bad_steps == 3
    assert resumed.global_step == 2
    assert not resumed.teacher.training
    resumed.on_train_epoch_start()
    again = resumed.train_step(make_batch(resumed, seed=9))
    assert report == again
    assert equal(resumed.network.state_dict(), trainer.network.state_dict())
    assert equal(resumed.teacher.state_dict(), trainer.teacher.state_dict())


def test_checkpoint_holds_the_teacher_outside_of_the_weights(tmp_path: Path) -> None:
    file = str(tmp_path / "checkpoint_final.pth")
    trainer = ready_trainer("2iters")
    an_epoch(trainer)
    trainer.save_checkpoint(file)
    checkpoint = read_safely(file)
    assert checkpoint["trainer_name"] == "DMEDSegTrainer_2iters"
    assert equal(checkpoint["network_weights"], trainer.network.state_dict())
    assert equal(checkpoint["diffext_teacher"], trainer.teacher.state_dict())
    assert not equal(checkpoint["network_weights"], checkpoint["diffext_teacher"])
    assert checkpoint["init_args"]["plans"]["diffext"]["DMEDSegTrainer"] == trainer.settings.as_dict()
    # what prediction does: build from the plans alone, load strictly
    manager = PlansManager(checkpoint["init_args"]["plans"])
    build = find_trainer("DMEDSegTrainer").build_network_architecture
    net = build(manager, manager.get_configuration("2d"), 1, 2, False)
    net.load_state_dict(checkpoint["network_weights"], strict=True)
    image = make_batch(trainer)["data"]
    with torch.no_grad():
        assert torch.equal(net.eval()(image), trainer.network.eval()(image))


def test_logged_curves_survive(tmp_path: Path) -> None:
    """Each loss has its curve; one that appears later is filled up with NaN."""
    file = str(tmp_path / "checkpoint_latest.pth")
    trainer = ready_trainer("2iters")
    an_epoch(trainer)
    trainer.current_epoch += 1
    curves = trainer.logger.local_logger.my_fantastic_logging
    assert {"train_sup", "train_cac", "train_diffusion"} <= set(curves)
    trainer._log("train_late", 4.0)
    assert len(curves["train_late"]) == 2 and np.isnan(curves["train_late"][0])
    trainer.current_epoch -= 1
    trainer.save_checkpoint(file)
    resumed = make_trainer("2iters")
    resumed.load_checkpoint(file)
    loaded = resumed.logger.local_logger.my_fantastic_logging
    assert loaded["train_sup"] == curves["train_sup"] and np.isfinite(loaded["train_sup"]).all()


def test_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "checkpoint_latest.pth")
    ready_trainer("IEFA").save_checkpoint(file)
    with pytest.raises(CheckpointError, match="written by DMEDSegTrainer_IEFA, not by DMEDSegTrainer_noCACL"):
        make_trainer("noCACL").load_checkpoint(file)


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    """The plans were changed between two runs under the same name."""
    file = str(tmp_path / "checkpoint_latest.pth")
    ready_trainer().save_checkpoint(file)
    other = make_trainer("", Kind((16, 24), ((1, 1), (2, 2), (2, 2)), features=(8, 16, 24)))
    with pytest.raises(CheckpointError, match="holds another network.*differ in shape.*Were the plans changed"):
        other.load_checkpoint(file)


def test_hostile_checkpoint_is_not_executed(tmp_path: Path) -> None:
    """nnU-Net itself reads checkpoints with ``weights_only=False``; ours must refuse the file before."""
    trace, file = tmp_path / "executed", str(tmp_path / "checkpoint_latest.pth")
    trainer = ready_trainer()
    trainer.save_checkpoint(file)
    checkpoint = read_safely(file)
    torch.save({**checkpoint, "logging": MakeDirectory(trace)}, file)
    with pytest.raises(CheckpointError, match="could run code"):
        make_trainer().load_checkpoint(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the file was harmless, so the test shows nothing"


class MakeDirectory:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("obstacle", ["missing", "not_a_folder"])
def test_failed_write_costs_a_warning_but_the_final_one_ends_the_training(
    tmp_path: Path, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither can be written, by root either; below a file not even the temporary file can be looked for."""
    (tmp_path / "not_a_folder").touch()
    trainer = ready_trainer()
    trainer.save_checkpoint(str(tmp_path / obstacle / "checkpoint_latest.pth"))
    assert "WARNING: Could not write" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="Could not write"):
        trainer.save_checkpoint(str(tmp_path / obstacle / "checkpoint_final.pth"))


def test_disabled_checkpointing_writes_nothing(tmp_path: Path) -> None:
    trainer = ready_trainer()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert list(tmp_path.iterdir()) == []
