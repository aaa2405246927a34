"""``nnunet_diffext prompts``: show what describes every label, and whether the text encoder takes it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register ``prompts``."""
    parser = subparsers.add_parser(
        "prompts",
        description="Show the text prompt of every label, as a training on the dataset reads it, and the block of "
        "dataset.json to change it with.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    parser.add_argument("--check", action="store_true", help="encode the prompts, and show how many tokens they have")
    parser.add_argument(
        "--encoder",
        metavar="FOLDER_OR_ID",
        help="text encoder for --check, which this implies: a local folder or a hub id (default: the variable "
        "nnUNet_diffext_text_encoder, else emilyalsentzer/Bio_ClinicalBERT)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the prompts; 1 if the encoder does not take one of them."""
    from nnunet_diffext.data.prompts import dataset_prompts

    found = dataset_prompts(args.d)
    print(f"Prompts from {found.file}:" if found.own else f"Prompts from the template ({found.file} has none):")
    for label, text in found.prompts.items():
        print(f"  {label}: {text}")
    if found.unread is not None:
        print(f"{found.unread} has other prompts, which trainings do not read. Copy it to {found.file} to use them.")
    print(f"To change them, put this into {found.file} and edit it:")
    print(json.dumps({"diffext": {"prompts": found.prompts}}, indent=2, ensure_ascii=False))
    return _check(found.prompts, args.encoder) if args.check or args.encoder else 0


def _check(prompts: Mapping[str, str], source: str | None) -> int:
    from nnunet_diffext.pretrained.text import load_text_encoder

    encoder = load_text_encoder(source)
    counts = encoder.token_counts(prompts)
    print(f"The text encoder {encoder.source} takes {encoder.limit} tokens:")
    for label, count in counts.items():
        print(f"  {label}: {count}" + (" (too long, shorten it)" if count > encoder.limit else ""))
    if max(counts.values()) > encoder.limit:
        return 1
    states = encoder.encode(prompts).states
    print(f"All prompts are encoded: up to {states.shape[1]} tokens with {states.shape[2]} features each.")
    return 0
