"""Train, predict and evaluate on a small synthetic dataset, next to stock nnU-Net."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``demo``."""
    parser = subparsers.add_parser(
        "demo",
        description="Make a synthetic dataset with labelled, unlabelled and test volumes; train DMEDSegTrainer and "
        "nnU-Net's own trainer on it with the stock commands, which are printed; predict and score the test volumes; "
        "draw what the network trusted. Everything in one folder, on a CPU.",
    )
    parser.add_argument("--out", type=Path, default=Path("nnunet_diffext_demo"), help="folder (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier demo in that folder first")
    parser.add_argument("--epochs", type=int, help="epochs of either training")
    parser.add_argument("--iters", type=int, help="iterations per epoch")
    parser.add_argument("--seed", type=int, default=0, help="of data and trainings (default: %(default)s)")
    parser.add_argument("-device", default="cpu", choices=("cpu", "cuda", "mps"), help="as for nnU-Net (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="smallest run through all steps; its results mean nothing")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 if one of its commands failed."""
    from nnunet_diffext.demo.commands import CommandError
    from nnunet_diffext.demo.runner import Demo, DemoOptions, prepare_folder, quick

    given = {"epochs": args.epochs, "iterations": args.iters, "seed": args.seed, "device": args.device}
    options = quick(args.out) if args.quick else DemoOptions(args.out)
    options = dataclasses.replace(options, **{key: value for key, value in given.items() if value is not None})
    prepare_folder(args.out, args.overwrite)
    try:
        Demo(options).run()
    except CommandError as error:
        print(f"nnunet_diffext demo: error: {error}", file=sys.stderr)
        return 1
    return 0
