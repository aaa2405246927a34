"""``nnunet_diffext calibrate``: one temperature for the probabilities of a model."""

from __future__ import annotations

import argparse

from nnunet_diffext.cli.predict import add_model_arguments, add_setting_arguments
from nnunet_diffext.files import CALIBRATION


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``calibrate``."""
    parser = subparsers.add_parser(
        "calibrate",
        description="Fit one temperature on the validation cases of the folds, each predicted by the fold that was not "
        "trained on it, and store it as calibration.json in the model folder. nnunet_diffext predict uses it from then "
        "on; segmentations do not change. Call it with the settings that you will predict with.",
    )
    add_model_arguments(parser)
    add_setting_arguments(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the figures, store nothing")
    parser.add_argument("--remove", action="store_true", help="delete calibration.json")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Fit, print, store."""
    from nnunet_diffext.inference.calibrate import calibrate, report_lines
    from nnunet_diffext.inference.calibration_file import (
        check_writable,
        fingerprints,
        remove_calibration,
        write_calibration,
    )
    from nnunet_diffext.inference.model_folder import check_folds, find_model_folder, parse_folds
    from nnunet_diffext.inference.predictor import Predictor

    folder = find_model_folder(args.d, args.c, args.tr, args.p, args.m)
    if args.remove:
        print("Removed" if remove_calibration(folder) else "There is no", folder / CALIBRATION)
        return 0
    folds = parse_folds(args.f)
    if "all" not in folds:
        check_folds(folder, folds, args.chk)
    if not args.dry_run:
        check_writable(folder)

    def make_predictor(fold: int) -> Predictor:
        return Predictor(
            folder, (fold,), checkpoint=args.chk, device=args.device, step_size=args.step_size,
            mirroring=not args.disable_tta, samples=args.samples, steps=args.steps, sampler=args.sampler,
            seed=args.seed, temperature=1.0,
        )  # fmt: skip

    content = calibrate(make_predictor, folds, seed=args.seed, show_progress=not args.disable_progress_bar)
    content["weights"] = fingerprints(folder, folds, args.chk)
    print("\n".join(report_lines(content)))
    if args.dry_run:
        print("Dry run: nothing was stored.")
    else:
        print(f"Wrote {write_calibration(folder, content)}; nnunet_diffext predict uses it from now on.")
    return 0
