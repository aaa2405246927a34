"""Print the directory that nnU-Net has to search for trainers."""

from __future__ import annotations

import argparse
from pathlib import Path

import nnunet_diffext


def trainer_directory() -> Path:
    """The directory for ``nnUNet_extTrainer``, absolute."""
    return Path(nnunet_diffext.__file__).resolve().parent / "ext_trainers"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``trainer_dir``."""
    subparsers.add_parser(
        "trainer_dir",
        description="Print the directory for nnU-Net's variable nnUNet_extTrainer: "
        'export nnUNet_extTrainer="$(nnunet_diffext trainer_dir)". Separate it from other directories '
        "with the system's path separator (':' on Linux and macOS, ';' on Windows).",
    )


def run(args: argparse.Namespace) -> int:
    """Print the directory."""
    print(trainer_directory())
    return 0
