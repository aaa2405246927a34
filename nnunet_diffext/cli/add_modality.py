"""``nnunet_diffext add_modality``: one more expert and head for a trained M4oE model."""

from __future__ import annotations

import argparse
import shlex


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``add_modality``."""
    parser = subparsers.add_parser(
        "add_modality",
        description="Give a trained M4oETrainer model another modality: an expert in every block, which starts as the "
        "mean of the others, and a head. The dataset holds the old modalities and the new one (nnunet_diffext merge, "
        "the new one last) and is preprocessed with the model's plans (nnUNetv2_move_plans_between_datasets). For the "
        "old modalities, the larger model predicts what the model did, bit for bit, until it is trained.",
    )
    parser.add_argument("-m", required=True, metavar="MODEL_FOLDER", help="model to extend; it is not changed")
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or ID of the dataset with the new modality")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="new model folder; must not exist")
    parser.add_argument("-f", nargs="+", default=(0,), metavar="FOLD", help="folds to extend (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Extend, and say how to train on."""
    from pathlib import Path

    from nnunet_diffext.data.dataset import dataset_id, dataset_name
    from nnunet_diffext.files import FINAL
    from nnunet_diffext.inference.model_folder import check_folds, find_model_folder, parse_folds
    from nnunet_diffext.trainers.m4oe_growth import add_modality

    folder, folds = find_model_folder(None, None, model_folder=args.m), parse_folds(args.f)
    check_folds(folder, folds, FINAL)
    growth = add_modality(folder, args.d, Path(args.o).resolve(), folds)
    before, after = growth.parameters
    labels = f", labels {', '.join(growth.labels)}" if growth.labels else ""
    number = dataset_id(dataset_name(args.d))
    if growth.folds:
        print(growth.folds)
    print(
        f"{growth.folder}: modality {growth.modality} added{labels}; {before / 1e6:.2f} M parameters became "
        f"{after / 1e6:.2f} M.\nTrain only what is new, or without the token freezeOld everything:\n"
        f"  export nnUNet_diffext_pretraining={shlex.quote(str(growth.folder))}\n"
        f"  nnUNetv2_train {number} {growth.configuration} {folds[0]} -tr {growth.trainer}_freezeOld "
        f"-p {growth.plans}"
    )
    return 0
