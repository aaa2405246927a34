"""One label space for several datasets: labels with one name are one class, a mapping renames and drops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_diffext.data.dataset import foreground

BACKGROUND, IGNORE = "background", "ignore"
LabelMapping = Mapping[str, Mapping[str, str | None]]
"""Dataset -> label -> class of the merged dataset, "ignore", or None for background."""


@dataclass(frozen=True)
class LabelUnion:
    """The merged labels.

    Attributes:
        labels: of the merged ``dataset.json``: background, the classes in order of appearance, ignore if there is any.
        values: per dataset, value in its label files -> value in the merged ones.
        classes: per dataset, label -> class. Labels that are dropped or ignored are absent.
    """

    labels: dict[str, int]
    values: dict[str, dict[int, int]]
    classes: dict[str, dict[str, str]]


def source_labels(dataset_json: Mapping[str, Any]) -> dict[str, int]:
    """Label -> value, sorted by value; background is left out, the ignore label is the last one.

    Raises:
        ValueError: regions, no labels, two names for one value, or an ignore label that is no number.
    """
    labels = foreground(dataset_json)
    regions = [name for name, values in labels.items() if len(values) > 1]
    if regions:
        raise ValueError(
            f"has regions ({_quoted(regions)}), which are several labels at once and cannot share a softmax with the "
            'labels of other datasets. Put a copy of the dataset beside it whose "labels" give every value one name, '
            'without "regions_class_order", and merge that.'
        )
    found = {name: values[0] for name, values in labels.items()}
    ignore = dataset_json["labels"].get(IGNORE)
    if ignore is not None and (not isinstance(ignore, int) or ignore in (0, *found.values())):
        raise ValueError(f'the label "{IGNORE}" must have a value of its own, but has {ignore!r}.')
    return found | ({IGNORE: ignore} if ignore is not None else {})


def unite(sources: Mapping[str, Mapping[str, int]], mapping: LabelMapping) -> LabelUnion:
    """The union of the labels of all datasets.

    Args:
        sources: dataset -> label -> value, see :func:`source_labels`.
        mapping: labels that it does not name keep their name.

    Raises:
        ValueError: a mapping that does not fit the datasets; names that differ only in spelling, with a mapping that
            settles it; a dataset without a label that is left.
    """
    _check_mapping(sources, mapping)
    renamed = {
        dataset: {label: IGNORE if label == IGNORE else mapping.get(dataset, {}).get(label, label) for label in labels}
        for dataset, labels in sources.items()
    }
    _check_spelling(renamed, mapping)
    empty = [dataset for dataset, labels in renamed.items() if not {*labels.values()} - {None, IGNORE}]
    if empty:
        raise ValueError(
            f"No label of {', '.join(empty)} is left, so it cannot teach anything. Keep one of its labels, or leave it "
            "out and put its images into imagesTu of another dataset with the same modality."
        )
    named = dict.fromkeys(name for labels in renamed.values() for name in labels.values() if name is not None)
    # nnU-Net wants the ignore label last.
    order = [BACKGROUND, *(name for name in named if name != IGNORE), *([IGNORE] if IGNORE in named else [])]
    labels = {name: value for value, name in enumerate(order)}
    return LabelUnion(
        labels,
        values={
            dataset: {0: 0} | {value: labels[renamed[dataset][label] or BACKGROUND] for label, value in found.items()}
            for dataset, found in sources.items()
        },
        classes={
            dataset: {label: name for label, name in found.items() if name not in (None, IGNORE)}
            for dataset, found in renamed.items()
        },
    )


def _check_mapping(sources: Mapping[str, Mapping[str, int]], mapping: LabelMapping) -> None:
    where = "The mapping of labels"
    if not isinstance(mapping, Mapping) or not all(isinstance(entry, Mapping) for entry in mapping.values()):
        shown = {dataset: {label: "name" for label in labels} for dataset, labels in sources.items()}
        raise ValueError(f"{where} must hold a dictionary per dataset, such as {json.dumps(shown)}.")
    unknown = [dataset for dataset in mapping if dataset not in sources]
    if unknown:
        raise ValueError(f"{where} names {_quoted(unknown)}; the datasets are {_quoted(sources)}.")
    for dataset, entry in mapping.items():
        labels = [label for label in sources[dataset] if label != IGNORE]
        unknown = [label for label in entry if label not in labels]
        if unknown:
            raise ValueError(f"{where}: {dataset} has no label {_quoted(unknown)} to map; it has {_quoted(labels)}.")
        for label, name in entry.items():
            if name is not None and (not isinstance(name, str) or not name.strip() or name == BACKGROUND):
                raise ValueError(
                    f"{where}: {dataset}, {label!r}: {name!r} is no name of a class. Write a name, null (without "
                    'quotes) for background, or "ignore".'
                )


def _check_spelling(renamed: Mapping[str, Mapping[str, str | None]], mapping: LabelMapping) -> None:
    """Two datasets that write one class in two ways would silently get two classes."""
    spellings: dict[str, dict[str, set[str]]] = {}  # without case and separators -> name -> datasets
    for dataset, labels in renamed.items():
        for name in labels.values():
            if name is not None:
                plain = re.sub(r"[\s_-]+", "", name).casefold()
                spellings.setdefault(plain, {}).setdefault(name, set()).add(dataset)
    conflicts = [names for names in spellings.values() if len(names) > 1 and len(set.union(*names.values())) > 1]
    if not conflicts:
        return
    first = {name: IGNORE if IGNORE in names else next(iter(names)) for names in conflicts for name in names}
    proposal = {dataset: dict(entry) for dataset, entry in mapping.items()}
    for dataset, labels in renamed.items():
        for label, name in labels.items():
            if name is not None and first.get(name, name) != name:
                proposal.setdefault(dataset, {})[label] = first[name]
    raise ValueError(
        f"Labels that differ only in spelling: {'; '.join(_quoted(names) for names in conflicts)}. If they are the "
        "same class, put this into a file and name it with --labels; if not, give them clearer names there:\n"
        f"{json.dumps(proposal, indent=2, ensure_ascii=False)}"
    )


def _quoted(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(map(repr, names))
