"""Finding the training that another one builds on: a stage is an ordinary ``nnUNetv2_train`` call."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2 import paths

from nnunet_diffext.checkpoints import CheckpointError, read_safely
from nnunet_diffext.files import FINAL

DATA_KEYS = (
    "spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name",
    "resampling_fn_data", "resampling_fn_seg", "resampling_fn_data_kwargs", "resampling_fn_seg_kwargs",
)  # fmt: skip
"""Entries of a configuration that the preprocessed data depend on."""
PLAN_DATA_KEYS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
"""Likewise, entries of the plans."""
MUST_AGREE = (*DATA_KEYS, "data_identifier", "patch_size")
"""What two stages of one configuration share; the batch size may differ."""


class StageError(ValueError):
    """The earlier stage is missing or does not fit; the message has the command that makes it."""


@dataclass(frozen=True)
class Stage:
    """A finished training.

    Attributes:
        folder: model folder, ``<trainer>__<plans>__<configuration>``.
        fold: of the training.
        trainer_name: class that trained it.
        plans: its ``plans.json``.
        weights: state dict of its network.
    """

    folder: Path
    fold: int | str
    trainer_name: str
    plans: Mapping[str, Any]
    weights: Mapping[str, Any]


def train_command(dataset: str, configuration: str, fold: int | str, trainer: str, plans: str) -> str:
    """The command that makes a stage."""
    return f"nnUNetv2_train {dataset} {configuration} {fold} -tr {trainer} -p {plans}"


def results_folder(dataset: str) -> Path:
    """Folder of the dataset in ``nnUNet_results``.

    Raises:
        StageError: the variable is not set.
    """
    if not paths.nnUNet_results.is_set():
        raise StageError("The environment variable nnUNet_results is not set. Set it to the folder that nnU-Net uses.")
    return Path(paths.nnUNet_results) / dataset


def find_model_folder(
    stage: str,
    dataset: str,
    configuration: str,
    trainer: str,
    plans_names: Sequence[str],
    fold: int | str,
    alternatives: str = "",
    otherwise: str = "",
) -> Path:
    """Model folder of an earlier stage: ``nnUNet_diffext_<stage>`` if set, else by name in ``nnUNet_results``.

    Args:
        stage: name of the stage in messages and in the environment variable.
        trainer: class name that the stage was trained with.
        plans_names: plans to look for, the first found wins.
        fold: must be finished there.
        alternatives: how the names of trainers begin that may be offered instead.
        otherwise: what else the user can do without the stage.
    Raises:
        StageError: with the command that makes the stage, and the trainings that exist instead; or the variable names
            no model folder, or another checkpoint than the final one of this fold.
    """
    variable = f"nnUNet_diffext_{stage}"
    given = os.environ.get(variable)
    if given:
        folder = Path(given)
        if folder.suffix == ".pth":
            used = folder.parent.parent / f"fold_{fold}" / FINAL
            if folder != used:
                raise StageError(
                    f"{variable}={given} is not what would be used: a training of fold {fold} builds on "
                    f"fold_{fold}/{FINAL}. Set the variable to the model folder, the one that holds plans.json."
                )
            folder = used.parents[1]
        if not (folder / "plans.json").is_file():
            raise StageError(f"{variable}={given} is no model folder: there is no {folder / 'plans.json'}.")
        return folder
    results = results_folder(dataset)
    candidates = [results / f"{trainer}__{plans}__{configuration}" for plans in plans_names]
    for folder in candidates:
        if (folder / f"fold_{fold}" / FINAL).is_file():
            return folder
    command = train_command(dataset, configuration, fold, trainer, plans_names[-1])
    started = next((f for f in candidates if (f / f"fold_{fold}").is_dir()), None)
    if started is not None:
        raise StageError(
            f"The {stage} is not finished: {started / f'fold_{fold}'} has no {FINAL}. Finish it first:\n  {command} --c"
        )
    others = sorted(
        f.parent.parent.name for f in results.glob(f"{alternatives}*__*__{configuration}/fold_{fold}/{FINAL}")
    )
    lines = [f"No {stage} for fold {fold} in {results}. Train it first:", f"  {command}"]
    if others:
        lines += [f"Or use a finished training, if it fits ({', '.join(others)}): export {variable}={results}/NAME"]
    raise StageError("\n".join([*lines, *([otherwise] if otherwise else [])]))


def load_stage(folder: Path, fold: int | str) -> Stage:
    """Read plans and weights of a finished fold, without running anything that the files may hold.

    Raises:
        StageError: no finished training there. CheckpointError: the file is damaged or unsafe.
    """
    checkpoint_file = folder / f"fold_{fold}" / FINAL
    if not checkpoint_file.is_file():
        state = "is not finished" if checkpoint_file.parent.is_dir() else "does not exist"
        raise StageError(f"Fold {fold} of {folder} {state}: there is no {checkpoint_file}.")
    checkpoint = read_safely(checkpoint_file)
    if not {"network_weights", "trainer_name"} <= set(checkpoint):
        raise CheckpointError(f"{checkpoint_file} is no checkpoint of nnU-Net: it holds no network_weights.")
    plans = _read_json(folder / "plans.json")
    return Stage(folder, fold, checkpoint["trainer_name"], plans, checkpoint["network_weights"])


def check_fits(stage: Stage, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> None:
    """Whether a stage was trained on the same dataset, preprocessing, patch and labels.

    Raises:
        StageError: naming what differs.
    """
    own, theirs = plans["dataset_name"], stage.plans["dataset_name"]
    if own != theirs:
        raise StageError(f"{stage.folder} was trained on {theirs}, this training is on {own}. Use a training on {own}.")
    if configuration not in stage.plans["configurations"]:
        known = ", ".join(stage.plans["configurations"])
        raise StageError(
            f"{stage.folder} has no configuration {configuration} (it has {known}). "
            "Train it in this configuration, or use one of its own."
        )
    different = differences(stage.plans, plans, configuration)
    if different:
        raise StageError(
            f"{stage.folder} was trained with other plans: {different}. Train it with the plans {plans['plans_name']}."
        )
    file = stage.folder / "dataset.json"
    if file.is_file():
        trained = _read_json(file)
        for key in ("labels", "channel_names"):
            if trained.get(key) != dataset_json.get(key):
                raise StageError(
                    f"{stage.folder} was trained with other {key}: {trained.get(key)}, here {dataset_json.get(key)}. "
                    "Train it again on the dataset as it is now."
                )


def differences(there: Mapping[str, Any], here: Mapping[str, Any], configuration: str) -> str:
    """What two plans do not agree on that data and networks depend on; empty if nothing."""
    there, here = ({**p, **_resolved(p, configuration)} for p in (there, here))
    different = [key for key in (*MUST_AGREE, *PLAN_DATA_KEYS) if here.get(key) != there.get(key)]
    if not different:
        return ""
    key = different[0]
    return f"{', '.join(different)} differ ({key} is {there.get(key)} there and {here.get(key)} here)"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{file} cannot be read: {error}. Train that stage again, or use another one.") from error


def _resolved(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    block = dict(plans["configurations"][configuration])
    if "inherits_from" in block:
        return {**_resolved(plans, block["inherits_from"]), **block}
    return block
