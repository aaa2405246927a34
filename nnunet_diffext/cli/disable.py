"""Undo ``nnunet_diffext enable``."""

from __future__ import annotations

import argparse

from nnunet_diffext.cli.enable import PTH_NAME, disable


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``disable``."""
    subparsers.add_parser("disable", description=f"Remove {PTH_NAME} from this environment's site-packages.")


def run(args: argparse.Namespace) -> int:
    """Disable, and say what was done."""
    print(disable())
    return 0
