"""Run the stock nnU-Net commands as subprocesses, with their own folders, a log each and readable failures.

Used by the demo and by the scripts in ``benchmarks/``: what they measure is the command a user would type, not an
internal function of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TAIL_LINES = 25


_EPOCH_PARTS = {
    "epoch": re.compile(r": Epoch (\d+)\s*$"),
    "loss": re.compile(r"train_loss ([-\d.naninf]+)"),
    "dice": re.compile(r"Pseudo dice (\[.*\])"),
    "seconds": re.compile(r"Epoch time: ([\d.]+) s"),
}


class CommandError(Exception):
    """A command ended with a non-zero exit status. The message holds the last lines of its output and its log."""


@dataclass(frozen=True)
class CommandResult:
    """What was run: the command line as typed, its wall-clock time in seconds and the file with all its output."""

    command: str
    seconds: float
    log: Path


class EpochReport:
    """Turns nnU-Net's training log into one line per epoch, for `run_command`."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._values: dict[str, str] = {}

    def __call__(self, line: str) -> str | None:
        """The line to print once an epoch is over, None before."""
        for key, pattern in _EPOCH_PARTS.items():
            match = pattern.search(line)
            if match:
                self._values[key] = match[1]
        if "seconds" in self._values and "epoch" in self._values:
            values = self._values
            self._values = {}
            # nnU-Net prints numpy's repr, "[np.float32(0.91), ...]".
            dice = ", ".join(re.findall(r"\d\.\d+|nan", values.get("dice", "")))
            epoch = int(values["epoch"]) + 1
            return f"epoch {epoch}/{self.epochs}  {values['seconds']} s  loss {values.get('loss')}  pseudo Dice {dice}"
        match = re.search(r"Mean Validation Dice: +([\d.]+)", line)
        return f"final validation: mean Dice {float(match[1]):.4f}" if match else None


def find_script(name: str) -> str:
    """Path of the console script ``name``, the running interpreter's environment first.

    Raises:
        FileNotFoundError: neither beside the interpreter nor on PATH.
    """
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if found is None:
        raise FileNotFoundError(
            f"The command '{name}' is neither beside {sys.executable} nor on PATH. "
            f"Install the package that brings it into this environment (pip install nnunet_diffext)."
        )
    return found


def nnunet_environment(root: Path, num_processes: int = 2) -> dict[str, str]:
    """Copy of the environment in which nnU-Net's three folders lie below ``root`` and our trainers are found.

    Args:
        root: folder that gets ``nnUNet_raw``, ``nnUNet_preprocessed`` and ``nnUNet_results``; they are made.
        num_processes: workers for augmentation, preprocessing and export.
    """
    env = dict(os.environ)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = root.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        env[name] = str(folder)
    # Asked from the command, as a user would: the documented route is tried on every run.
    trainer_dir = subprocess.run(
        [find_script("nnunet_diffext"), "trainer_dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    others = [p for p in env.get("nnUNet_extTrainer", "").split(os.pathsep) if p and p != trainer_dir]
    env["nnUNet_extTrainer"] = os.pathsep.join([*others, trainer_dir])
    env["nnUNet_n_proc_DA"] = env["nnUNet_def_n_proc"] = str(num_processes)
    env["MPLBACKEND"] = "Agg"
    env["PYTHONUNBUFFERED"] = "1"
    return env


@contextmanager
def in_environment(env: Mapping[str, str]) -> Iterator[None]:
    """nnU-Net's variables of ``env`` in this process too, for calls of its Python functions; restored afterwards."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in env.items() if name.startswith("nnUNet_")})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_command(
    arguments: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    *,
    report: Callable[[str], str | None] | None = None,
) -> CommandResult:
    """Print a command, run it, write all it says to ``log`` and print what ``report`` makes of it.

    Args:
        arguments: name of a console script and its arguments.
        env: complete environment of the child.
        log: file for stdout and stderr together; overwritten.
        report: gets every line, returns the text to print or None; no report, no progress.

    Raises:
        CommandError: non-zero exit status.
        FileNotFoundError: no such console script.
    """
    command = shlex.join(arguments)
    print(f"$ {command}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    start = time.perf_counter()
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            [find_script(arguments[0]), *arguments[1:]],
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                text = report(line) if report is not None else None
                if text is not None:
                    print("    " + text, flush=True)
        except BaseException:
            # Popen's exit waits for the child: without this an interrupt would hang until the training is over.
            process.terminate()
            raise
    if process.returncode != 0:
        raise CommandError(
            f"'{command}' ended with exit status {process.returncode}. Its last lines:\n\n{''.join(tail)}\n"
            f"Everything it said: {log}"
        )
    return CommandResult(command, time.perf_counter() - start, log)
