"""``nnunet_diffext split``: write a semi-supervised split into ``splits_final.json``."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``split``."""
    parser = subparsers.add_parser(
        "split",
        description="Keep the labels of a few training cases and list the other ones under 'unlabeled' in "
        "splits_final.json, which stock nnU-Net ignores. Validation cases stay as they are. Without a file, nnU-Net's "
        "own five folds are made first.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    labeled = parser.add_mutually_exclusive_group(required=True)
    labeled.add_argument(
        "--labeled",
        metavar="N",
        help="labelled training cases to keep per fold: a number (4) or a share of the training cases (5%%); the first "
        "ones in alphabetical order, or see --seed",
    )
    labeled.add_argument("--labeled-cases", nargs="+", metavar="ID", help="keep these labelled cases")
    parser.add_argument("-f", type=int, metavar="FOLD", help="change this fold only (default: all folds)")
    parser.add_argument("--seed", type=int, help="draw the labelled cases at random")
    parser.add_argument(
        "--val", nargs="+", metavar="ID", help="validation cases; without -f, the file gets a single fold with these"
    )
    parser.add_argument("-plans_name", help="plans whose cases to split; needed only if plans differ in their cases")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing splits_final.json (a copy of it is kept)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the split, and say what is in it."""
    from nnunet_diffext.data.splits import write_semisupervised_split

    report = write_semisupervised_split(
        args.d,
        args.labeled,
        labeled_cases=args.labeled_cases,
        val_cases=args.val,
        fold=args.f,
        seed=args.seed,
        plans_name=args.plans_name,
        overwrite=args.overwrite,
    )
    for fold, split in report.folds.items():
        print(
            f"fold {fold}: {len(split.train)} labelled, {len(split.unlabeled)} unlabelled, {len(split.val)} validation"
        )
        print(f"  labelled: {' '.join(split.train)}")
    print(f"Wrote {report.file}" + (f"; the old file is {report.backup}" if report.backup else ""))
    return 0
