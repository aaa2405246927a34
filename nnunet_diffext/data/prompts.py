"""One text per foreground label, from ``dataset.json`` or from its label and channel names; no text is about a case."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2 import paths

from nnunet_diffext.data.dataset import (
    NORMALIZATIONS,
    channel_names,
    dataset_name,
    diffext_block,
    foreground,
    load_json,
    nnunet_folder,
)

KEY = 'dataset.json["diffext"]["prompts"]'


class PromptError(ValueError):
    """Prompts that do not match the labels; the message names the place, the key and what is allowed."""


@dataclass(frozen=True)
class DatasetPrompts:
    """The prompts of a dataset in nnU-Net's folders.

    Attributes:
        file: the ``dataset.json`` that trainings read.
        prompts: label -> text.
        own: whether the file holds them; else they are made from the template.
        unread: the ``dataset.json`` in ``nnUNet_raw``, if its prompts are other ones.
    """

    file: Path
    prompts: dict[str, str]
    own: bool
    unread: Path | None


def prompts_for(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Label -> text, in the order of the segmentation heads without background.

    Args:
        dataset_json: its ``["diffext"]["prompts"]``, if present, must hold one text per foreground label or region.
            Otherwise the texts are those of :func:`template_prompts`.
    Raises:
        PromptError: a prompt for no label, a label without prompt, no text, or a block of another type.
        ValueError: no labels, see :func:`~nnunet_diffext.data.dataset.foreground`.
    """
    templates = template_prompts(dataset_json)
    block = written_prompts(dataset_json)
    if block is None:
        return templates
    _check(block, templates, KEY)
    missing = {label: templates[label] for label in templates if label not in block}
    if missing:
        raise PromptError(
            f"{KEY} has no prompt for {', '.join(missing)}. Every label needs one; these would do:\n"
            f"{json.dumps(missing, indent=2, ensure_ascii=False)}"
        )
    return {label: block[label].strip() for label in templates}


def written_prompts(dataset_json: Mapping[str, Any]) -> dict[str, Any] | None:
    """``["diffext"]["prompts"]`` as it stands there, or None.

    Raises:
        PromptError: one of the two is no dictionary.
    """
    return diffext_block(dataset_json, "prompts", lambda: template_prompts(dataset_json), PromptError)


def template_prompts(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """``"T1 and FLAIR image of the enhancing tumor"`` for a label ``enhancing_tumor``: the names, without underscores.

    Channels with one name are named once; names of normalisations, which nnU-Net allows for channels, are left out.
    """
    words = dict.fromkeys(_words(name) for name in channel_names(dataset_json) if name.lower() not in NORMALIZATIONS)
    *most, last = words or [""]
    image = f"{', '.join(most)} and {last} image" if most else f"{last} image".lstrip()
    return {label: f"{image} of the {_words(label)}" for label in foreground(dataset_json)}


def with_changes(prompts: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """The prompts with some texts replaced.

    Raises:
        PromptError: a change for a label that does not exist, or without text.
    """
    _check(changes, prompts, "The changes of prompts (LABEL=text)")
    return {label: changes.get(label, text).strip() for label, text in prompts.items()}


def parse_change(text: str) -> tuple[str, str]:
    """``"liver=a bright liver"`` -> ``("liver", "a bright liver")``.

    Raises:
        PromptError: no ``=``, or nothing before or behind it.
    """
    label, _, prompt = (part.strip() for part in text.partition("="))
    if not label or not prompt:
        raise PromptError(
            f"{text!r} is no change of a prompt. Write LABEL=text, such as 'liver=CT image of the liver'."
        )
    return label, prompt


def dataset_prompts(name_or_id: str | int) -> DatasetPrompts:
    """Prompts as a training would read them: from ``nnUNet_preprocessed``, before planning from ``nnUNet_raw``.

    Raises:
        PromptError: see :func:`prompts_for`. FileNotFoundError: no ``dataset.json``. ValueError: no such dataset.
    """
    name = dataset_name(name_or_id)
    files = [Path(p) / name / "dataset.json" for p in (paths.nnUNet_preprocessed, paths.nnUNet_raw) if p.is_set()]
    files = [file for file in files if file.is_file()] or [nnunet_folder("nnUNet_raw") / name / "dataset.json"]
    read, *others = files
    content = load_json(read, "Put the raw data of the dataset there, in nnU-Net's format.")
    try:
        prompts = prompts_for(content)
    except ValueError as error:
        raise PromptError(f"{read}: {error}") from error
    block = written_prompts(content)
    unread = next((file for file in others if written_prompts(load_json(file, "")) != block), None)
    return DatasetPrompts(read, prompts, block is not None, unread)


def _check(block: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    unknown = [label for label in block if label not in allowed]
    if unknown:
        raise PromptError(
            f"{where}: there is no label {', '.join(map(repr, unknown))} to describe. The labels are "
            f"{', '.join(map(repr, allowed))}."
        )
    for label, text in block.items():
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{where}: the prompt of '{label}' must be a text that is not empty, but is {text!r}.")


def _words(name: Any) -> str:
    return " ".join(str(name).replace("_", " ").split())
