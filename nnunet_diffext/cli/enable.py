"""Let bare ``nnUNetv2_train`` find the trainers, through a one-line ``.pth`` file in site-packages.

At interpreter start, Python's ``site`` module executes the lines of ``.pth`` files that begin with ``import``. Ours
appends our directory to ``nnUNet_extTrainer``, keeps what the user has put there, and does nothing once the directory
is gone: an uninstalled package cannot break the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from nnunet_diffext.cli.trainer_dir import trainer_directory

PTH_NAME = "nnunet_diffext.pth"
VARIABLE = "nnUNet_extTrainer"


def pth_file() -> Path:
    """Where the file of this interpreter is, or would be."""
    return Path(sysconfig.get_path("purelib")) / PTH_NAME


def pth_line(directory: Path) -> str:
    """The line for ``directory``. ASCII only: older Pythons read ``.pth`` files in the encoding of the locale."""
    return (
        f"import os; _d = {ascii(str(directory))}; _v = os.environ.get({VARIABLE!r}) or ''; "
        "os.path.isdir(_d) and _d not in _v.split(os.pathsep) and "
        f"os.environ.__setitem__({VARIABLE!r}, _v + os.pathsep + _d if _v else _d)\n"
    )


def export_command(directory: Path) -> str:
    """The alternative to :func:`enable`, for a POSIX shell; keeps an existing value."""
    return f'export {VARIABLE}="${{{VARIABLE}:+${VARIABLE}{os.pathsep}}}{directory}"'


def enable() -> str:
    """Write the file unless it is there already.

    Returns:
        What was done, for the user.

    Raises:
        ValueError: if site-packages is not writable, or a fresh interpreter does not execute the file.
    """
    path, directory = pth_file(), trainer_directory()
    line = pth_line(directory)
    if path.is_file() and path.read_text(encoding="utf-8") == line:
        return f"Already enabled: {path} adds {directory} to {VARIABLE}."
    try:
        path.write_text(line, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}). Use a virtual environment of your own, or set the variable in "
            f"your shell instead:\n  {export_command(directory)}"
        ) from error
    if str(directory) not in value_in_fresh_interpreter().split(os.pathsep):
        path.unlink()
        raise ValueError(
            f"{sys.executable} does not execute .pth files in {path.parent}, so nothing was changed. Set the variable "
            f"in your shell instead:\n  {export_command(directory)}"
        )
    return (
        f"Wrote {path}: every start of {sys.executable} now adds {directory} to {VARIABLE}, behind what the variable "
        "already holds. Undo with: nnunet_diffext disable"
    )


def disable() -> str:
    """Remove the file.

    Returns:
        What was done, for the user.

    Raises:
        ValueError: if the file cannot be removed.
    """
    path = pth_file()
    try:
        path.unlink()
    except FileNotFoundError:
        return f"Not enabled: there is no {path}."
    except OSError as error:
        raise ValueError(f"cannot remove {path} ({error.strerror}). Delete it as its owner.") from error
    return f"Removed {path}. A {VARIABLE} that is exported in a shell stays as it is."


def value_in_fresh_interpreter() -> str:
    """``nnUNet_extTrainer`` as a new process sees it that inherits no value."""
    env = {k: v for k, v in os.environ.items() if k != VARIABLE}
    code = f"import json, os; print(json.dumps(os.environ.get({VARIABLE!r}, '')))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return json.loads(done.stdout or '""')


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``enable``."""
    subparsers.add_parser(
        "enable",
        description=f"Write {PTH_NAME} into the site-packages of this Python environment, so that nnUNetv2_train and "
        f"nnUNetv2_predict find the trainers without {VARIABLE} being set. An existing value of the variable is kept.",
    )


def run(args: argparse.Namespace) -> int:
    """Enable, and say what was done."""
    print(enable())
    return 0
