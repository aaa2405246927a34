"""The output folder of a prediction, and the record of how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_diffext.files import write_atomically
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.quality import QualityTable

ARGUMENTS = "predict_from_raw_data_args.json"
TOLD = ("modality", "prompt")
"""Arguments that change what a model answers, beside the settings of every prediction."""


def prepare_folder(
    predictor: Predictor, folder: Path, continue_prediction: bool, arguments: Mapping[str, Any]
) -> QualityTable:
    """Make the output folder, and what nnU-Net puts there beside the predictions.

    Args:
        predictor: the model.
        folder: to make.
        continue_prediction: warn if what is there was made with other settings.
        arguments: of the call, written down.

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
        "dataset.json": predictor.model.dataset_json,
        "plans.json": predictor.model.plans.plans,
    }
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=4, default=str))
    return QualityTable(folder)


def _settings_of(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).get("settings", {}))
    except (ValueError, AttributeError, TypeError):
        return {}
