"""``nnunet_diffext report``: one HTML page about trained models."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``report``."""
    parser = subparsers.add_parser(
        "report",
        description="Write one HTML page about one model folder of nnU-Net, or about several side by side: a summary "
        "in plain words, metrics per structure, a paired comparison, best and worst cases with pictures, calibration, "
        "training curves, settings. The page needs no network and no other file. Model folders are only read.",
    )
    parser.add_argument(
        "-m", nargs="+", required=True, metavar="FOLDER", help="model folder(s), TRAINER__PLANS__CONFIGURATION"
    )
    parser.add_argument("-o", required=True, metavar="FILE", help="the page, for example report.html")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds (default: the numbered ones there, or all)")
    parser.add_argument(
        "-gt", metavar="FOLDER", help="references (default: gt_segmentations of nnUNet_preprocessed, or nnUNet_raw)"
    )
    parser.add_argument(
        "-pred", nargs="+", metavar="FOLDER", help="folder of predictions per model (default: the folds' validation)"
    )
    parser.add_argument("--cases", type=int, metavar="N", help="best and worst cases with pictures, each (default: 3)")
    parser.add_argument("-np", type=int, metavar="N", help="number of processes (default: nnUNet_def_n_proc, or 8)")


def run(args: argparse.Namespace) -> int:
    """Write the page and say what is missing on it."""
    from nnunet_diffext.report.page import CASES, write_report

    report = write_report(
        args.m,
        args.o,
        folds=args.f,
        gt=args.gt,
        pred=args.pred,
        cases=CASES if args.cases is None else args.cases,
        num_processes=args.np,
        show_progress=True,
    )
    for line in report.problems:
        print(f"note: {line}", file=sys.stderr)
    print(f"Wrote {report.file}")
    return 0
