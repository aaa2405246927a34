"""``nnunet_diffext merge``: make one dataset out of several, for one network with an expert per modality."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_diffext.data.merge import MergeReport


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``merge``."""
    parser = subparsers.add_parser(
        "merge",
        description="Make one raw dataset out of several: labels with the same name are one class, every case keeps "
        "its modality and knows which labels were annotated in it. Unlabelled and test images (imagesTu, imagesTs, "
        "labelsTs) come along. Files are linked unless they must change.",
    )
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="names or IDs of two or more datasets")
    parser.add_argument("-o", type=int, required=True, metavar="ID", help="number of the new dataset; must be free")
    parser.add_argument("--name", required=True, help="name of the new dataset, for nnUNet_raw/Dataset<ID>_<NAME>")
    parser.add_argument(
        "--modality", nargs="+", required=True, metavar="NAME", help="one per dataset, such as CT MR CEMR; may repeat"
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help='JSON, such as {"Dataset001_X": {"Liver": "liver", "vein": null}}: other names for labels; null makes a '
        'label background, "ignore" takes its voxels out of the training',
    )
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    parser.add_argument("-np", type=int, metavar="N", help="number of processes (default: nnUNet_def_n_proc, or 8)")


def run(args: argparse.Namespace) -> int:
    """Merge, and say what is in the new dataset and what to do next."""
    from pathlib import Path

    from nnunet_diffext.data.dataset import load_json
    from nnunet_diffext.data.merge import merge_datasets

    labels = load_json(Path(args.labels), "Name an existing file with --labels.") if args.labels else None
    report = merge_datasets(
        args.d, args.modality, args.o, args.name, labels=labels, copy=args.copy, num_processes=args.np
    )
    print("\n".join(_lines(report, args.o)))
    return 0


def _lines(report: MergeReport, number: int) -> Iterator[str]:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    rows = [("source", "modality", "cases", "unlabelled", "test", "annotated labels")]
    for s in report.sources:
        test = f"{len(s.test)} ({len(s.test_label_files)} with labels)" if s.test else "0"
        labels = ", ".join(report.classes[s.name])
        rows.append((s.name, s.modality, str(len(s.cases)), str(len(s.unlabeled)), test, labels))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    content = report.dataset_json
    yield f"labels: {', '.join(f'{name} {value}' for name, value in content['labels'].items())}"
    for index, name in content["channel_names"].items():
        were = ", ".join(dict.fromkeys(s.channels[int(index)] for s in report.sources))
        scheme = get_normalization_scheme(name).__name__
        yield f"channel {index}: {name}" + (f" (was {were})" if were != name else "") + f", normalised by {scheme}"
    ending = content["file_ending"]
    others = [f"{s.name} ({s.ending})" for s in report.sources if s.ending != ending]
    if others:
        yield f"format: {ending}, also for images to predict; converted: {', '.join(others)}"
    yield f"splits: {report.splits_note}" + (f", in {report.splits}" if report.splits else "")
    yield f"Wrote {report.folder}. Next:"
    yield f"  nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity"
    flat = all(s.flat for s in report.sources)
    if any(s.unlabeled for s in report.sources):
        yield f"  nnunet_diffext preprocess_unlabeled -d {number}"
    for trainer in ("M4oEPretrainTrainer", "M4oETrainer"):
        yield f"  nnUNetv2_train {number} {'2d' if flat else '3d_fullres'} 0 -tr {trainer}"
