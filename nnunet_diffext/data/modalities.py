"""Which modality a case has, and which labels somebody looked for in it: ``dataset.json["diffext"]``.

A label that was never annotated in a case is not background there: nobody knows where it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_diffext.data.dataset import NORMALIZATIONS, channel_names, diffext_block, foreground

MODALITIES = "modalities"
KEY = 'dataset.json["diffext"]["modalities"]'
ANNOTATED_KEY = 'dataset.json["diffext"]["annotated"]'
ALLOWED = "letters, digits, '-', '_' and '+'"


class ModalityError(ValueError):
    """Modalities that do not match cases or labels; the message names the key, what is wrong, and what is allowed."""


@dataclass(frozen=True)
class Modalities:
    """Modalities of a dataset, made by :func:`modalities_of`.

    Attributes:
        names: of the modalities, in the order in which ``dataset.json`` first mentions them. A model's experts are in
            this order too, so it is the file's order that counts, not the alphabet.
        of_case: case -> modality. Empty: the file names none, and every case has the only modality.
        heads: names of the segmentation heads: background and the labels by value, or the regions as they stand.
        listed: modality or case -> which heads are annotated. Whatever is absent has all of them.
    """

    names: tuple[str, ...]
    of_case: Mapping[str, str]
    heads: tuple[str, ...]
    listed: Mapping[str, tuple[bool, ...]]

    def modality(self, case: str) -> str:
        """Modality of a case.

        Raises:
            ModalityError: the file names modalities, but none for this case.
        """
        if not self.of_case:
            return self.names[0]
        if case not in self.of_case:
            raise ModalityError(
                f"{KEY} has no modality for the case {case!r}. Add it there, in nnUNet_raw and in nnUNet_preprocessed, "
                f"whose copy trainings read. The modalities are {', '.join(self.names)}."
            )
        return self.of_case[case]

    def index(self, case: str) -> int:
        """Place of a case's modality in ``names``; errors as :meth:`modality`."""
        return self.names.index(self.modality(case))

    def annotated(self, case: str) -> tuple[bool, ...]:
        """Which heads are annotated in a case, as long as ``heads``. Background always is; it means "none of these".

        Raises:
            ModalityError: see :meth:`modality`.
        """
        everything = (True,) * len(self.heads)
        return self.listed[case] if case in self.listed else self.listed.get(self.modality(case), everything)

    def classes(self, modality: str) -> tuple[bool, ...]:
        """Which heads are annotated in at least one case of a modality, as long as ``heads``.

        Raises:
            ModalityError: no such modality.
        """
        if modality not in self.names:
            raise ModalityError(f"There is no modality {modality!r}; the modalities are {', '.join(self.names)}.")
        cases = [case for case, name in self.of_case.items() if name == modality]
        masks = [self.annotated(case) for case in cases] or [(True,) * len(self.heads)]
        return tuple(any(head) for head in zip(*masks, strict=True))


def modalities_of(dataset_json: Mapping[str, Any]) -> Modalities:
    """Modalities of a dataset. Without any in the file it is one, named as channel 0, with every label annotated.

    Args:
        dataset_json: its ``["diffext"]["modalities"]``, if present, holds a modality per case, those without labels
            included; ``["diffext"]["annotated"]`` the names of the annotated labels (regions) by modality or case. A
            case wins over its modality; an absent key means every label.

    Raises:
        ModalityError: wrong types; a name with other characters than allowed; unknown labels, modalities or cases; an
            empty list; a label that is annotated nowhere.
        ValueError: no labels, see :func:`~nnunet_diffext.data.dataset.foreground`.
    """
    labels = foreground(dataset_json)
    regions = any(len(values) > 1 for values in labels.values())
    heads = tuple(labels) if regions else ("background", *labels)
    of_case = diffext_block(dataset_json, MODALITIES, lambda: {"case_001": "CT", "case_002": "MR"}, ModalityError)
    annotated = diffext_block(dataset_json, "annotated", lambda: {"CT": list(labels)}, ModalityError) or {}
    if of_case is None:
        if annotated:
            raise ModalityError(f"{ANNOTATED_KEY} needs {KEY} beside it, which says which cases there are.")
        return Modalities((_name_of_channel(dataset_json),), {}, heads, {})
    if not of_case:
        raise ModalityError(f"{KEY} names no case. Give every case a modality, or leave the key out.")
    for case, name in of_case.items():
        check_name(name, f"{KEY}, case {case!r}")
    names = tuple(dict.fromkeys(of_case.values()))
    both = [name for name in names if name in of_case]
    if both:
        raise ModalityError(f"{KEY}: {_quoted(both)} is the name of a modality and of a case. Rename one of them.")
    listed = {}
    for key, entry in annotated.items():
        if key not in names and key not in of_case:
            raise ModalityError(
                f"{ANNOTATED_KEY}: {key!r} is neither a modality ({_quoted(names)}) nor a case of {KEY}."
            )
        _check_labels(entry, list(labels), f"{ANNOTATED_KEY}[{json.dumps(key)}]")
        listed[key] = tuple(head in entry or (head == "background" and not regions) for head in heads)
    found = Modalities(names, of_case, heads, listed)
    known = zip(*(found.classes(name) for name in names), strict=True)
    nowhere = [head for head, modalities in zip(heads, known, strict=True) if not any(modalities)]
    if nowhere:
        raise ModalityError(f"{ANNOTATED_KEY}: no case has {_quoted(nowhere)} annotated. Add it, or remove the label.")
    return found


def check_name(name: Any, where: str) -> None:
    """A modality's name becomes part of log lines and of keys.

    Raises:
        ModalityError: no text, or other characters than those of ``ALLOWED``.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
        raise ModalityError(f"{where}: {name!r} is no name of a modality. Use {ALLOWED}, such as CT or MR-T1.")


def _check_labels(entry: Any, labels: Sequence[str], where: str) -> None:
    allowed = f"The labels are {_quoted(labels)}."
    if not isinstance(entry, list) or not all(isinstance(label, str) for label in entry):
        raise ModalityError(f"{where} must be a list of names of labels, but is {entry!r}. {allowed}")
    unknown = [label for label in entry if label not in labels]
    if unknown:
        raise ModalityError(f"{where}: {_quoted(unknown)} cannot be annotated. {allowed}")
    if not entry:
        raise ModalityError(
            f"{where} is empty: there is nothing to learn from such labels. Leave the key out if every label is "
            f"annotated, or move the images to imagesTu if none is. {allowed}"
        )


def _name_of_channel(dataset_json: Mapping[str, Any]) -> str:
    first = next(iter(channel_names(dataset_json)), "")
    name = re.sub(r"[^A-Za-z0-9_+-]+", "_", first).strip("_")
    return name if name and first.lower() not in NORMALIZATIONS else "image"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
