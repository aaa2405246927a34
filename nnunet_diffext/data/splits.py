"""Semi-supervised splits: ``splits_final.json`` with a list ``"unlabeled"`` beside nnU-Net's ``train`` and ``val``.

Stock nnU-Net ignores the key: the supervised baseline on the labelled cases and the semi-supervised run share one file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_diffext.data.dataset import dataset_id, dataset_name, load_json, preprocessed_folder, training_ids
from nnunet_diffext.files import write_atomically

SPLITS_FILE = "splits_final.json"
# nnUNetTrainer.do_split
STANDARD_SEED, STANDARD_FOLDS = 12345, 5


@dataclass(frozen=True)
class Split:
    """One fold: ids of the labelled training cases, the validation cases, and the training cases without labels."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    unlabeled: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitReport:
    """What :func:`write_semisupervised_split` did: the file, the copy of its predecessor, the folds that it changed."""

    file: Path
    backup: Path | None
    folds: dict[int, Split]


def load_split(preprocessed_dataset_dir: str | Path, fold: int) -> Split:
    """One validated fold of ``splits_final.json``.

    Args:
        preprocessed_dataset_dir: ``<nnUNet_preprocessed>/<dataset>``.
        fold: index into the file. Fold ``"all"`` has no entry: there every labelled case is trained on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such fold; wrong types; an id that is listed twice; an unlabelled id that is also in train or
            val, which would be trained on with its label, or would tell the model about the validation images.
    """
    folder = Path(preprocessed_dataset_dir)
    file = folder / SPLITS_FILE
    command = f"nnunet_diffext split -d {dataset_id(folder.name)} --labeled N"
    splits = _as_list(load_json(file, f"Make it with: {command}"), file)
    return _parse(_entry(splits, fold, file), file, fold)


def number_of_folds(preprocessed_dataset_dir: str | Path) -> int:
    """Entries of ``splits_final.json``; 0 without the file. Beyond them nnU-Net draws a random 80:20 split."""
    file = Path(preprocessed_dataset_dir) / SPLITS_FILE
    return len(_as_list(load_json(file, ""), file)) if file.is_file() else 0


def write_semisupervised_split(
    name_or_id: str | int,
    labeled: int | str | None = None,
    *,
    labeled_cases: Sequence[str] | None = None,
    val_cases: Sequence[str] | None = None,
    fold: int | None = None,
    seed: int | None = None,
    plans_name: str | None = None,
    overwrite: bool = False,
) -> SplitReport:
    """Keep a few labelled training cases per fold and list the others as unlabelled; ``val`` stays as it is.

    Without a file, nnU-Net's own five folds are made first. In an existing file, the training cases of a fold are those
    in ``train`` and those in ``unlabeled``, so 4 labels can be turned into 8 without starting again. The old file is
    copied to ``splits_final_<time>.json`` and the new one replaces it in one step.

    Args:
        name_or_id: dataset.
        labeled: how many to keep, ``4`` or ``"5%"`` of the training cases of the fold (rounded half up, at least 1):
            the first ones of the sorted ids, or random ones with ``seed``.
        labeled_cases: these instead of ``labeled``.
        val_cases: validation cases, instead of those of the fold. Without ``fold``, the file gets a single fold.
        fold: change this fold only; default: all folds.
        seed: draw the labelled cases. With one seed, the 4 drawn ones are among the 8 drawn ones.
        plans_name: plans whose preprocessed folder names the training cases; needed only if plans differ in them.
        overwrite: replace an existing file.

    Raises:
        ValueError: a file exists and ``overwrite`` is not set; more labelled cases asked for than there are; unknown
            ids; unknown fold; a file that cannot be used; fewer cases than nnU-Net's five folds need.
        FileNotFoundError: the dataset is not preprocessed.
    """
    if (labeled is None) == (labeled_cases is None):
        raise ValueError("Give either a number of labelled cases (--labeled) or their ids (--labeled-cases).")
    if labeled_cases is not None and seed is not None:
        raise ValueError("--seed draws the labelled cases, but --labeled-cases names them. Leave one of them out.")
    name = dataset_name(name_or_id)
    file = preprocessed_folder(name) / SPLITS_FILE
    splits = _base_splits(name, file, plans_name, single=val_cases is not None and fold is None, overwrite=overwrite)
    if fold is not None:
        _entry(splits, fold, file)
    have_labels = set(training_ids(name, plans_name))
    changed: dict[int, Split] = {}
    for index in range(len(splits)) if fold is None else [fold]:
        current = _parse(splits[index], file, index)
        changed[index] = _resplit(current, index, labeled, labeled_cases, val_cases, seed, have_labels)
        lists = {"train": changed[index].train, "val": changed[index].val, "unlabeled": changed[index].unlabeled}
        splits[index] = {**splits[index], **{key: list(ids) for key, ids in lists.items()}}
    backup = _back_up(file) if file.exists() else None
    write_atomically(file, json.dumps(splits, indent=4))
    return SplitReport(file, backup, changed)


def labeled_count(labeled: int | str, available: int) -> int:
    """``4``, ``"4"`` or ``"5%"`` of ``available`` cases as a number of cases; percentages round half up, to at least 1.

    Raises:
        ValueError: not a number, not positive, above 100 %, or more cases than there are.
    """
    text = str(labeled).strip()
    try:
        number = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    percent = text.endswith("%")
    if number <= 0 or (percent and number > 100) or (not percent and number.denominator != 1):
        raise ValueError(
            f"Labelled cases: {labeled!r} is neither a positive number of cases, such as 4, nor a share, such as 5%."
        )
    count = max(1, math.floor(number * available / 100 + Fraction(1, 2))) if percent else int(number)
    if count > available:
        raise ValueError(f"{count} labelled cases asked for, but the fold has only {available} training cases.")
    return count


def _base_splits(name: str, file: Path, plans_name: str | None, *, single: bool, overwrite: bool) -> list[Any]:
    """The folds to start from: those of the file, nnU-Net's standard ones, or one that holds every case."""
    if file.exists() and not overwrite:
        raise ValueError(
            f"{file} exists already, and trainings may depend on it. Use --overwrite to replace it; the old file is "
            "kept as a copy beside it."
        )
    if single:
        return [{"train": training_ids(name, plans_name), "val": []}]
    if file.exists():
        return _as_list(load_json(file, ""), file)
    ids = training_ids(name, plans_name)
    if len(ids) < STANDARD_FOLDS:
        raise ValueError(
            f"{name} has {len(ids)} training cases, too few for nnU-Net's {STANDARD_FOLDS} folds. Name the validation "
            "cases with --val; this makes a split with one fold."
        )
    splits = generate_crossval_split(ids, seed=STANDARD_SEED, n_splits=STANDARD_FOLDS)
    return [{key: [str(i) for i in value] for key, value in entry.items()} for entry in splits]


def _resplit(
    current: Split,
    fold: int,
    labeled: int | str | None,
    labeled_cases: Sequence[str] | None,
    val_cases: Sequence[str] | None,
    seed: int | None,
    have_labels: set[str],
) -> Split:
    """Divide the cases of a fold anew. Unlabelled ones without any label, as those of ``imagesTu``, stay that."""
    images_only = tuple(i for i in current.unlabeled if i not in have_labels)
    everything = {*current.train, *current.unlabeled, *current.val} - set(images_only)
    val = current.val
    if val_cases is not None:
        _require_known(val_cases, everything, f"validation cases of fold {fold}", "cases of the dataset")
        val = tuple(sorted(val_cases))
        pool = sorted(everything - set(val))
    else:
        pool = sorted({*current.train, *current.unlabeled} - set(images_only))
    if labeled_cases is not None:
        hint = "training cases of the fold (with several folds, choose one with -f)"
        _require_known(labeled_cases, set(pool), f"labelled cases of fold {fold}", hint)
        chosen = set(labeled_cases)
    else:
        count = labeled_count(labeled, len(pool))
        order = range(len(pool)) if seed is None else np.random.RandomState(seed).permutation(len(pool))
        chosen = {pool[i] for i in order[:count]}
    train = tuple(i for i in pool if i in chosen)
    return Split(train, val, (*(i for i in pool if i not in chosen), *images_only))


def _require_known(ids: Sequence[str], known: set[str], what: str, of_what: str) -> None:
    duplicates = _duplicates(ids)
    if duplicates:
        raise ValueError(f"The {what} name {duplicates} more than once.")
    unknown = [i for i in ids if i not in known]
    if unknown or not ids:
        raise ValueError(f"The {what} {unknown or '(none given)'} are not among the {len(known)} {of_what}.")


def _as_list(content: Any, file: Path) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise ValueError(f'{file} must hold a non-empty list with one {{"train": [...], "val": [...]}} per fold.')
    return content


def _entry(splits: list[Any], fold: int, file: Path) -> Any:
    if not isinstance(fold, int) or isinstance(fold, bool):
        raise ValueError(f"Fold must be a number, not {fold!r}: fold 'all' has no entry in {file}.")
    if not 0 <= fold < len(splits):
        raise ValueError(f"{file} has {len(splits)} folds (0 to {len(splits) - 1}); there is no fold {fold}.")
    return splits[fold]


def _parse(entry: Any, file: Path, fold: int) -> Split:
    """Validate one entry. That ``train`` and ``val`` share ids is left to nnU-Net, which allows it with a warning."""
    where = f"{file}, fold {fold}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be a dictionary with the keys train and val, not {type(entry).__name__}.")
    lists: dict[str, tuple[str, ...]] = {}
    for key in ("train", "val", "unlabeled"):
        ids = entry.get(key, [] if key == "unlabeled" else None)
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            found = "missing" if key not in entry else f"{str(ids)[:80]!r}"
            raise ValueError(f"{where}: '{key}' must be a list of case ids (strings), but is {found}.")
        duplicates = _duplicates(ids)
        if duplicates:
            raise ValueError(f"{where}: '{key}' lists {duplicates} more than once.")
        lists[key] = tuple(ids)
    for key in ("train", "val"):
        both = sorted(set(lists["unlabeled"]) & set(lists[key]))
        if both:
            raise ValueError(
                f"{where}: {both} are listed in 'unlabeled' and in '{key}'. Remove them from one of these."
            )
    return Split(lists["train"], lists["val"], lists["unlabeled"])


def _duplicates(ids: Sequence[str]) -> list[str]:
    return sorted(i for i, n in Counter(ids).items() if n > 1)


def _back_up(file: Path) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    backup, number = file.with_name(f"{file.stem}_{stamp}.json"), 1
    while backup.exists():
        number += 1
        backup = file.with_name(f"{file.stem}_{stamp}-{number}.json")
    shutil.copy2(file, backup)
    return backup


def keep_labeled_percent(split: Split, percent: float) -> Split:
    """The fold with ``percent`` of its training cases labelled, the first ones by id; all others are unlabelled.

    The share counts all training cases, so a fold of 4 labelled and 76 unlabelled ones has 5 % labels already.

    Raises:
        ValueError: the share is 0, above 100, or larger than the labels that the fold has.
    """
    everything = sorted((*split.train, *split.unlabeled))
    count = labeled_count(f"{percent}%", len(everything))
    if count > len(split.train):
        raise ValueError(
            f"{percent:g} % of {len(everything)} training cases are {count} labelled ones, but the fold has only "
            f"{len(split.train)}. Use a smaller share, or another split."
        )
    train = sorted(split.train)[:count]
    return Split(tuple(train), split.val, tuple(i for i in everything if i not in set(train)))
