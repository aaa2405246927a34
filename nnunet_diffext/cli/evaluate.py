"""``nnunet_diffext evaluate``: metrics and calibration of predictions, and comparison of models."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        description="Score a folder of predictions: Dice, IoU, HD95, ASD, NSD and volumes per case and label, and "
        "calibration where nnU-Net saved probabilities (--save_probabilities or --npz). Writes summary_diffext.json, "
        "metrics_diffext.csv, reliability.png and risk_coverage.png. With --compare: paired statistics of models that "
        "are evaluated. Exit code 1 if a case could not be evaluated; the others are all the same.",
    )
    parser.add_argument("-pred", metavar="FOLDER", help="predicted segmentations, and CASE.npz with probabilities")
    parser.add_argument("-gt", metavar="FOLDER", help="references of the same names")
    parser.add_argument("-djfile", metavar="FILE", help="dataset.json (default: the one in the prediction folder)")
    parser.add_argument("-pfile", metavar="FILE", help="plans.json (default: beside dataset.json, if there is one)")
    parser.add_argument(
        "-o", metavar="FOLDER", help="where to write (default: the prediction folder; with --compare: this folder)"
    )
    parser.add_argument("-np", type=int, metavar="N", help="number of processes (default: nnUNet_def_n_proc, or 8)")
    parser.add_argument(
        "--chill", action="store_true", help="exit with 0 although cases are missing or could not be evaluated"
    )
    parser.add_argument("--nsd-tolerance", type=float, metavar="MM", help="tolerance of the NSD in mm (default: 2)")
    parser.add_argument(
        "--band", type=float, metavar="MM", help="width of the band around the foreground for calibration (default: 10)"
    )
    parser.add_argument("--bins", type=int, metavar="N", help="bins of the calibration errors (default: 15)")
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument(
        "--compare",
        nargs="+",
        metavar="MODEL",
        help="two or more evaluated folders, or their summary_diffext.json; writes comparison.json",
    )
    comparison.add_argument(
        "--common-cases", action="store_true", help="compare on the cases that all models have, if they differ"
    )
    comparison.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to compare")
    comparison.add_argument("--seed", type=int, default=0, help="of bootstrap and permutations (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Evaluate or compare, and say what was found; 1 if a case failed and ``--chill`` was not given."""
    if args.compare:
        return _compare(args)
    if not (args.pred and args.gt):
        raise ValueError("-pred and -gt are needed, or --compare with folders that are evaluated already")
    from nnunet_diffext.evaluation.folder import evaluate_predictions, table
    from nnunet_diffext.evaluation.task import Options

    given = {"nsd_tolerance": args.nsd_tolerance, "band_mm": args.band, "bins": args.bins}
    result = evaluate_predictions(
        args.pred,
        args.gt,
        dataset_json=args.djfile,
        plans=args.pfile,
        out=args.o,
        options=Options(**{name: value for name, value in given.items() if value is not None}),
        num_processes=args.np,
        show_progress=True,
    )
    print(table(result.report))
    print(result.report["implementation"])
    for file in result.files:
        print(f"Wrote {file}")
    for line in result.remarks():
        print(f"note: {line}", file=sys.stderr)
    problems = result.problems()
    for line in problems:
        print(f"not evaluated: {line}", file=sys.stderr)
    return int(bool(problems) and not args.chill)


def _compare(args: argparse.Namespace) -> int:
    from nnunet_diffext.evaluation.compare import compare_models, comparison_table, load_models, write_comparison

    if args.pred or args.gt:
        raise ValueError("--compare takes folders that are evaluated already; leave out -pred and -gt")
    comparison = compare_models(
        load_models(args.compare), metrics=args.metrics, common_cases=args.common_cases, seed=args.seed
    )
    file = write_comparison(comparison, args.o or ".")
    print(comparison_table(comparison))
    print(f"Wrote {file}")
    return 0
