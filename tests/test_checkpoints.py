"""Checkpoint files: a crash at any moment leaves a whole file, and reading one runs no code of its own."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_diffext.checkpoints import CheckpointError, read_safely, write_checkpoint

sys.path.insert(0, str(Path(__file__).parent / "networks"))
from tiny import make_batch, ready_trainer  # noqa: E402

OLD = {"network_weights": {"w": torch.arange(6.0)}, "current_epoch": 3}
LARGE = {"network_weights": {"w": torch.zeros(1_000_000)}}  # 4 MB


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint that exists already."""
    path = tmp_path / "checkpoint_latest.pth"
    write_checkpoint(OLD, path)
    return path


def assert_old_one_is_whole_and_alone(path: Path) -> None:
    assert torch.equal(read_safely(path)["network_weights"]["w"], OLD["network_weights"]["w"])
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file was left behind"


# ------------------------------------------------------------------ writing
def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best.pth"
    write_checkpoint(OLD, str(path))
    assert_old_one_is_whole_and_alone(path)
    write_checkpoint({"n": 1}, path)
    assert read_safely(str(path)) == {"n": 1}


def test_it_is_flushed_to_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power failure may leave an empty file under the final name."""
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), real_replace(a, b)))
    write_checkpoint(OLD, tmp_path / "checkpoint_latest.pth")
    assert steps == ["fsync", "replace"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_failure_of_the_last_steps_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(CheckpointError, match=f"Could not write {file}.*No space left.*previous version is still in"):
        write_checkpoint(LARGE, file)
    assert_old_one_is_whole_and_alone(file)


def test_file_size_limit_keeps_the_old_file(file: Path) -> None:
    """A write that the operating system really cuts short, in the middle of torch's own serialisation."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="Could not write.*Free disk space.*previous version is still in"):
            write_checkpoint(LARGE, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_old_one_is_whole_and_alone(file)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte. Needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_old_file(tiny_disk: Path) -> None:
    path = tiny_disk / "checkpoint_latest.pth"
    write_checkpoint(OLD, path)
    with pytest.raises(CheckpointError, match="previous version is still in place"):
        write_checkpoint(LARGE, path)
    assert_old_one_is_whole_and_alone(path)
    write_checkpoint(OLD, path)  # and the space is free again


def test_first_write_that_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No older version exists"):
        write_checkpoint(OLD, tmp_path / "no_such_folder" / "checkpoint_latest.pth")


WRITER = """
import sys, torch
from nnunet_diffext.checkpoints import write_checkpoint
for i in range(10**9):
    write_checkpoint({"n": i, "w": torch.full((4_000_000,), float(i))}, sys.argv[1])
"""


def temporary_bytes(folder: Path) -> int:
    """Size of what is being written beside the checkpoint; 0 if nothing is."""
    for path in folder.iterdir():
        if path.name != "checkpoint_latest.pth":
            try:
                return path.stat().st_size
            except FileNotFoundError:  # renamed meanwhile
                return 0
    return 0


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_kill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """The writer is stopped, seen to be half way through a file, and killed. The file of the round before is whole."""
    path = tmp_path / "checkpoint_latest.pth"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    half_way, deadline = False, time.monotonic() + 60
    try:
        while not half_way and time.monotonic() < deadline and writer.poll() is None:
            if path.exists() and temporary_bytes(tmp_path):
                writer.send_signal(signal.SIGSTOP)
                time.sleep(0.02)
                half_way = 0 < temporary_bytes(tmp_path) < 15_000_000
                if not half_way:
                    writer.send_signal(signal.SIGCONT)
            time.sleep(0.0005)
    finally:
        writer.kill()
        writer.wait()
    assert half_way, "the writer was never seen in the middle of a file beside the checkpoint"
    checkpoint = read_safely(path)
    assert torch.equal(checkpoint["w"], torch.full((4_000_000,), float(checkpoint["n"])))


# ------------------------------------------------------------------ reading
class MakeDirectory:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def plain_pickle(thing: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing, protocol=2))  # torch's own


def legacy_torch(thing: Any, path: Path) -> None:
    torch.save(thing, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, legacy_torch, plain_pickle])
def test_hostile_file_is_refused_and_not_executed(tmp_path: Path, save: Callable) -> None:
    path, trace = tmp_path / "checkpoint_final.pth", tmp_path / "executed"
    save({**OLD, "logging": MakeDirectory(trace)}, path)
    with pytest.raises(CheckpointError, match="checkpoint_final.pth .* holds more than plain data; it was not loaded"):
        read_safely(path)
    assert not trace.exists()
    if save is plain_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists(), "the file was harmless, so the test shows nothing"


def test_allow_list_ends_with_the_call(file: Path) -> None:
    """Other code of the process that loads with ``weights_only`` gets no more than torch allows."""
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: the order means nothing
    read_safely(file)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_damaged_file(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match="checkpoint_latest.pth"):
        read_safely(file)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(CheckpointError, match=f"No checkpoint at {path}"):
            read_safely(path)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_])
def test_numpy_scalars_of_the_logger(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"_best_ema": dtype(1), "logging": {"dice": [dtype(0), dtype(1)]}}, path)
    loaded = read_safely(path)
    assert loaded == {"_best_ema": 1, "logging": {"dice": [0, 1]}}
    assert type(loaded["_best_ema"]) is dtype


@pytest.mark.parametrize("base", ["DMEDSegTrainer", "nnUNetTrainer"])
def test_real_checkpoints_are_plain(base: str, nnunet_folders: dict[str, Path], tmp_path: Path) -> None:
    """What nnU-Net puts into a checkpoint after an epoch: logger, optimiser, plans, device."""
    trainer = ready_trainer("2iters", base=base)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batch = make_batch(trainer) if base == "DMEDSegTrainer" else stock_batch(trainer)
    trainer.on_train_epoch_end([trainer.train_step(batch) for _ in range(2)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step({k: batch[k] for k in ("data", "target")})])
    trainer.on_epoch_end()
    trainer.current_epoch -= 1
    path = tmp_path / "checkpoint_final.pth"
    trainer.save_checkpoint(str(path))
    checkpoint = read_safely(path)
    assert checkpoint["trainer_name"] == type(trainer).__name__ == f"{base}_2iters"
    assert checkpoint["current_epoch"] == 1
    assert isinstance(checkpoint["_best_ema"], np.floating), "the logger holds no NumPy scalar: the test shows nothing"
    assert checkpoint["init_args"]["configuration"] == "2d"
    weights = trainer.network.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in checkpoint["network_weights"].items())


def stock_batch(trainer: Any) -> dict[str, Any]:
    """Targets at every scale of deep supervision, as nnU-Net's loader gives them."""
    image = torch.randn(2, 1, 16, 24)
    targets = [torch.randint(2, (2, 1, 16, 24)).short(), torch.randint(2, (2, 1, 8, 12)).short()]
    return {"data": image, "target": targets}
