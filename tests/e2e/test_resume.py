"""Trainings that stop and go on: killed, continued, out of disk space."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from workspace import MAIN, Workspace, curves, log_of, make_trainer, script, train

from nnunet_diffext.checkpoints import CheckpointError, read_safely

LONG = "DMEDSegTrainer_900epochs_1iters_1valiters_save1"
SHORT = "DMEDSegTrainer_3epochs_2iters_1valiters_save1_seed7"


def continue_one_epoch(trainer_name: str, workspace: Workspace) -> None:
    """``--c`` goes on from the epoch of ``checkpoint_latest.pth``, with complete curves and the teacher of the file."""
    fold = workspace.model(MAIN, trainer_name) / "fold_0"
    saved = read_safely(fold / "checkpoint_latest.pth")
    epochs = saved["current_epoch"]
    assert epochs >= 1
    trainer = make_trainer(MAIN, trainer_name, resume=True)
    assert trainer.current_epoch == epochs
    for key, value in trainer.teacher.state_dict().items():
        assert torch.equal(value, saved["diffext_teacher"][key]), key
    trainer.num_epochs = epochs + 1
    trainer.run_training()
    logged = curves(fold / "checkpoint_final.pth")
    assert {key: len(values) for key, values in logged.items()} == dict.fromkeys(logged, epochs + 1)
    assert logged["train_cac"][:epochs] == saved["logging"]["train_cac"]
    assert not (fold / "checkpoint_latest.pth").exists()
    assert not list(fold.glob(".*")), "the killed training left a temporary file"


def test_killed_training_continues(own_workspace: Workspace) -> None:
    command = [str(script("nnUNetv2_train")), MAIN, "3d_fullres", "0", "-tr", LONG, "-device", "cpu"]
    output = subprocess.DEVNULL
    # its own process group, so that its data loading workers die with it
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    latest = own_workspace.model(MAIN, LONG) / "fold_0" / "checkpoint_latest.pth"
    try:
        end = time.monotonic() + 240
        while not latest.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert latest.exists()
        time.sleep(0.7)  # into the next epochs
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    continue_one_epoch(LONG, own_workspace)


def test_training_killed_while_it_writes_a_checkpoint_continues(own_workspace: Workspace) -> None:
    name = LONG.replace("900", "901")
    harness = Path(__file__).with_name("killed_while_writing.py")
    done = subprocess.run(
        [sys.executable, str(harness), MAIN, name], env={**os.environ, "nnUNet_n_proc_DA": "0"}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    fold = own_workspace.model(MAIN, name) / "fold_0"
    (half,) = fold.glob(".*")
    assert 0 < half.stat().st_size < (fold / "checkpoint_latest.pth").stat().st_size
    continue_one_epoch(name, own_workspace)


# ---------------------------------------------------------------------- an unbroken run and a resumed one
class Batches:
    """The same batches in every run: the one of step i depends on i only."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def __next__(self) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(1000 * self.seed + self.step)
        self.step += 1
        images = torch.randn(2, 3, 12, 12, 12, generator=source)
        return {"data": images[:, :1], "target": (images[:, :1] > 1).short(), "unlabeled": images[:, 1:]}


class Interrupted(Exception):
    """Stands for the loss of the process."""


def run(trainer: Any, stop_after: int | None = None) -> list[dict[str, Any]]:
    """Train on :class:`Batches`; returns what every step reports. Dies after ``stop_after`` epochs."""
    steps: list[dict[str, Any]] = []
    first, plain_step, plain_end = trainer.current_epoch, trainer.train_step, trainer.on_epoch_end

    def step(batch: dict) -> dict:
        steps.append(plain_step(batch))
        return steps[-1]

    def end() -> None:
        plain_end()
        if stop_after == trainer.current_epoch:
            raise Interrupted

    trainer.get_dataloaders = lambda: (Batches(1, 2 * first), Batches(2, first))
    trainer.train_step, trainer.on_epoch_end = step, end
    try:
        trainer.run_training()
    except Interrupted:
        pass
    return steps


def test_resumed_run_equals_an_unbroken_one(own_workspace: Workspace) -> None:
    unbroken = make_trainer(MAIN, SHORT)
    expected = run(unbroken)
    final = own_workspace.model(MAIN, SHORT) / "fold_0" / "checkpoint_final.pth"
    wanted = torch.load(final, weights_only=False)
    for file in final.parent.glob("*.pth"):
        file.unlink()

    got = run(make_trainer(MAIN, SHORT), stop_after=2)
    torch.manual_seed(99)  # another process has another random state
    resumed = make_trainer(MAIN, SHORT, resume=True)
    assert resumed.current_epoch == 2
    got += run(resumed)

    assert len(expected) == len(got) == 6 and "cac" in expected[0]
    for a, b in zip(expected, got, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    checkpoint = torch.load(final, weights_only=False)
    for part in ("network_weights", "diffext_teacher"):
        assert all(torch.equal(checkpoint[part][k], wanted[part][k]) for k in wanted[part])
    for key, values in wanted["logging"].items():
        assert len(checkpoint["logging"][key]) == 3
        if "timestamps" not in key:
            np.testing.assert_array_equal(checkpoint["logging"][key], values)


# ---------------------------------------------------------------------- refused checkpoints
class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


def refused(own_workspace: Workspace, name: str, message: str) -> None:
    """``--c`` refuses ``checkpoint_latest.pth``, without changing or adding a checkpoint."""
    fold = own_workspace.model(MAIN, name) / "fold_0"
    before = {f.name: f.read_bytes() for f in fold.glob("*.pth")}
    with pytest.raises(CheckpointError, match=message):
        train(MAIN, name, continue_training=True)
    assert {f.name: f.read_bytes() for f in fold.glob("*.pth")} == before


def test_resume_refuses_what_does_not_fit(own_workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    source = torch.load(trained / "fold_0" / "checkpoint_best.pth", weights_only=False)
    name = "DMEDSegTrainer_2epochs_1iters_1valiters"
    fold = own_workspace.model(MAIN, name) / "fold_0"
    fold.mkdir(parents=True)
    file = fold / "checkpoint_latest.pth"

    torch.save(source, file)
    refused(own_workspace, name, "was written by DMEDSegTrainer_1epochs_2iters_1valiters_seed1, not by")

    source["trainer_name"] = name
    torch.save(source, file)
    plans = own_workspace.preprocessed(MAIN) / "nnUNetPlans.json"
    planned = plans.read_text()
    content = json.loads(planned)
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 24]
    plans.write_text(json.dumps(content))
    refused(own_workspace, name, "holds another network: .* Were the plans changed")
    plans.write_text(planned)

    trace = tmp_path / "executed"
    torch.save({**source, "logging": Payload(trace)}, file)
    refused(own_workspace, name, "could run code")
    assert not trace.exists()

    file.write_bytes(b"PK\x03\x04 cut off")
    refused(own_workspace, name, "is damaged or")


# ---------------------------------------------------------------------- full disk
@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond that fails with an error of the operating system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_costs_a_warning_until_the_final_checkpoint(own_workspace: Workspace) -> None:
    name = "DMEDSegTrainer_3epochs_1iters_1valiters_save1"
    trainer = make_trainer(MAIN, name)
    fold = own_workspace.model(MAIN, name) / "fold_0"
    plain, full = trainer.save_checkpoint, []

    def save(filename: str) -> None:
        if trainer.current_epoch == 0:
            return plain(filename)
        full.append(Path(filename).name)
        with files_of_at_most(100_000):
            plain(filename)

    trainer.save_checkpoint = save
    trainer.get_dataloaders = lambda: (Batches(1, 0), Batches(2, 0))
    with pytest.raises(CheckpointError, match="Free disk space or check permissions. No older version exists."):
        trainer.run_training()
    assert "checkpoint_latest.pth" in full and full[-1] == "checkpoint_final.pth"
    log = log_of(fold)
    assert "WARNING: Could not write" in log and "The previous version is still in place. Training goes on." in log
    assert "Epoch 2" in log
    assert not (fold / "checkpoint_final.pth").exists()
    assert not list(fold.glob(".*"))
    # nothing is lost but the epochs since
    assert read_safely(fold / "checkpoint_latest.pth")["current_epoch"] == 1
    assert make_trainer(MAIN, name, resume=True).current_epoch == 1
