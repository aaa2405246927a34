"""``nnunet_diffext preprocess_unlabeled``: preprocess images without labels for semi-supervised training."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``preprocess_unlabeled``."""
    parser = subparsers.add_parser(
        "preprocess_unlabeled",
        description="Preprocess images without labels with nnU-Net's own preprocessor into "
        "<nnUNet_preprocessed>/<dataset>/<data_identifier>_unlabeled. The dataset must be planned. All images are "
        "checked before the first is preprocessed. Cases that are there already, unchanged, are skipped.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    parser.add_argument("-plans_name", default="nnUNetPlans", help="plans to use (default: %(default)s)")
    parser.add_argument(
        "-c",
        nargs="+",
        metavar="CONFIGURATION",
        help="default: those of 2d, 3d_fullres and 3d_lowres that the plans have",
    )
    parser.add_argument(
        "-i",
        metavar="FOLDER",
        help="images, called {CASE}_{XXXX}{file_ending} (default: <nnUNet_raw>/<dataset>/imagesTu)",
    )
    parser.add_argument("-np", type=int, metavar="N", help="number of processes (default: nnUNet_def_n_proc, or 8)")
    parser.add_argument("--overwrite", action="store_true", help="preprocess cases again that are there already")


def run(args: argparse.Namespace) -> int:
    """Preprocess, and say what is where."""
    from nnunet_diffext.data.unlabeled import preprocess_unlabeled

    report = preprocess_unlabeled(args.d, args.plans_name, args.c, args.i, args.np, args.overwrite)
    for configuration, folder in report.folders.items():
        written, unchanged = len(report.written[configuration]), len(report.unchanged[configuration])
        print(f"{configuration}: {written} case(s) preprocessed, {unchanged} unchanged, in {folder}")
    return 0
