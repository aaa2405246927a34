"""The output folder of a prediction, and the record of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffext.data.modalities import MODALITIES, ModalityError, modalities_of
from nnunet_diffext.files import write_atomically
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.quality import QualityTable
from nnunet_diffext.settings import PLANS_KEY

ARGUMENTS = "predict_from_raw_data_args.json"
TOLD = ("modality", "prompt")
"""Arguments that change what a model answers, beside the settings of every prediction."""


def prepare_folder(
    predictor: Predictor,
    folder: Path,
    continue_prediction: bool,
    arguments: Mapping[str, Any],
    cases: Sequence[str] = (),
) -> QualityTable:
    """Make the output folder, and what nnU-Net puts there beside the predictions.

    If the modality was given, ``dataset.json`` names it for every case, for whoever evaluates the predictions.

    Args:
        predictor: the model.
        folder: to make.
        continue_prediction: warn if what is there was made with other settings.
        arguments: of the call, written down.
        cases: names of all in the input folder, also of those that other parts of the call predict.

    Raises:
        ValueError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"Cannot write to the output folder {folder} ({why}). Choose another -o.") from error
    told = {key: arguments.get(key) for key in TOLD}
    settings = {**predictor.settings.as_dict(), "temperature": predictor.temperature, **told}
    file = folder / ARGUMENTS
    if continue_prediction and file.is_file():
        before = _settings_of(file)
        changed = [k for k, v in before.items() if k in settings and json.loads(json.dumps(settings[k])) != v]
        if changed:
            now = ", ".join(f"{k} {before[k]} (now {settings[k]})" for k in changed)
            print(f"WARNING: the predictions that are there were made with other settings: {now}.")
    record = {**arguments, "model_folder": str(predictor.model_folder), "settings": settings}
    contents = {
        ARGUMENTS: record,
        "dataset.json": _with_modality(predictor.model.dataset_json, arguments.get("modality"), cases, folder),
        "plans.json": predictor.model.plans.plans,
    }
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=4, default=str))
    return QualityTable(folder)


def _with_modality(
    dataset_json: Mapping[str, Any], modality: str | None, cases: Sequence[str], folder: Path
) -> dict[str, Any]:
    """``dataset.json`` with the modality of the cases, and of those of earlier calls into the same folder."""
    content = dict(dataset_json)
    block = content.get(PLANS_KEY, {})
    earlier = _part(_part(_read(folder / "dataset.json"), PLANS_KEY), MODALITIES)
    known = {**{case: name for case, name in earlier.items() if case not in cases}, **block.get(MODALITIES, {})}
    named = {**known, **(dict.fromkeys(cases, modality) if modality else {})}
    if not named:
        return content
    content[PLANS_KEY] = {**block, MODALITIES: named}
    try:
        modalities_of(content)
    except ModalityError as error:
        print(f"WARNING: the modality of the predicted cases is not in {folder / 'dataset.json'}: {error}")
        return dict(dataset_json)
    return content


def _settings_of(file: Path) -> dict[str, Any]:
    return _part(_read(file), "settings")


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
