"""Folds of a dataset that holds the cases of another one and more: what a model was trained on stays training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_diffext.data.dataset import preprocessed_folder, training_ids
from nnunet_diffext.data.splits import SPLITS_FILE, STANDARD_SEED, Split, load_split, number_of_folds
from nnunet_diffext.files import write_atomically

UNKNOWN = "nothing tells whether the model has seen cases that validate it now."


def continue_splits(old: str, new: str, folds: Sequence[int | str], plans_name: str) -> str:
    """Let the folds of ``new`` go on from those of ``old``; returns what was done, or could not be.

    A ``splits_final.json`` of ``new`` is checked. If there is none it is written: the folds of ``old``, and the other
    cases shared out over them.

    Args:
        old, new: names of datasets.
        folds: that a model of ``old`` was trained on, and will be on ``new``.
        plans_name: plans whose preprocessed folder of ``new`` names its cases.
    Raises:
        ValueError: a validation case of ``new`` is a training case of the same fold of ``old``; a damaged file.
        FileNotFoundError: ``new`` is not preprocessed.
    """
    file = preprocessed_folder(new) / SPLITS_FILE
    if set(folds) == {"all"}:
        return (
            f"Fold all has seen every case of {old}: go on with fold all, other folds would validate on some of them."
        )
    try:
        count = number_of_folds(preprocessed_folder(old))
    except FileNotFoundError:
        count = 0
    unknown = [fold for fold in folds if fold != "all" and int(fold) >= count]
    if unknown:
        return f"{old} has no fold {unknown[0]} in a {SPLITS_FILE} here: {UNKNOWN}"
    before = [load_split(preprocessed_folder(old), fold) for fold in range(count)]
    known = {case for split in before for case in (*split.train, *split.val)}
    listed = known.union(*(split.unlabeled for split in before))
    cases = training_ids(new, plans_name)
    missing = sorted(known - set(cases))
    if missing:
        return (
            f"{len(missing)} of {len(known)} cases of {old}, the first is {missing[0]}, have another name in {new}, or "
            f"are not there: {UNKNOWN}"
        )
    if not file.is_file():
        _write(before, [case for case in cases if case not in listed], file)
        return f"Wrote {file}: the folds of {old}, and the new cases shared out over them."
    for fold in (int(f) for f in folds if f != "all"):
        seen = sorted(set(load_split(file.parent, fold).val) & set(before[fold].train))
        if seen:
            raise ValueError(
                f"In {file}, fold {fold} validates on {len(seen)} cases that the model was trained on, the first is "
                f"{seen[0]}. Move that file away: nnunet_diffext add_modality then writes one that goes on from the "
                f"folds of {old}."
            )
    return ""


def _write(before: Sequence[Split], new_cases: Sequence[str], file: Path) -> None:
    """Each new case validates one fold and is trained on in the others; a single one is always trained on."""
    order = np.random.RandomState(STANDARD_SEED).permutation(len(new_cases))
    shuffled = [new_cases[i] for i in order]
    entries = []
    for fold, split in enumerate(before):
        val = shuffled[fold :: len(before)] if len(shuffled) > 1 and len(before) > 1 else []
        train = [case for case in shuffled if case not in val]
        entry = {"train": sorted([*split.train, *train]), "val": sorted([*split.val, *val])}
        entries.append({**entry, **({"unlabeled": list(split.unlabeled)} if split.unlabeled else {})})
    write_atomically(file, json.dumps(entries, indent=4))
