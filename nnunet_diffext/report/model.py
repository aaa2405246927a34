"""What a model folder of nnU-Net holds about how it was made. Read, never changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffext.checkpoints import CheckpointError, read_safely
from nnunet_diffext.data.dataset import load_json
from nnunet_diffext.evaluation.task import Task, load_task
from nnunet_diffext.files import CALIBRATION, FINAL

CHECKPOINTS = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d", re.MULTILINE)
_SPLIT = re.compile(r"This split has (\d+) training and (\d+) validation cases")
_POOL = re.compile(r"(\d+) labelled and (\d+) unlabelled training cases")


@dataclass(frozen=True)
class Fold:
    """One ``fold_X`` folder.

    Attributes:
        name: ``"0"`` or ``"all"``.
        folder: it.
        checkpoint: name of the checkpoint that was read, or empty.
        logging: nnU-Net's curves and ours, key -> one value per epoch.
        debug: content of debug.json.
        facts: from the training log: ``started``, ``ended``, ``cases``.
        problems: what is missing, one line each.
    """

    name: str
    folder: Path
    checkpoint: str
    logging: Mapping[str, Any]
    debug: Mapping[str, Any]
    facts: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether nnU-Net's training ran to its end."""
        return self.checkpoint == CHECKPOINTS[0]


@dataclass(frozen=True)
class ReportedModel:
    """A model folder.

    Attributes:
        folder: it.
        letter: short name on the page.
        trainer: name of the trainer.
        configuration: name of the configuration.
        plans: content of plans.json.
        planned: the configuration, as nnU-Net resolves it.
        task: labels and reader.
        folds: those that are reported.
        calibration: content of calibration.json, or ``None``.
        problems: what is missing, one line each.
    """

    folder: Path
    letter: str
    trainer: str
    configuration: str
    plans: Mapping[str, Any]
    planned: ConfigurationManager
    task: Task
    folds: tuple[Fold, ...]
    calibration: Mapping[str, Any] | None
    problems: tuple[str, ...]

    @property
    def dataset(self) -> str:
        """Name of the dataset that it was trained on."""
        return str(self.plans["dataset_name"])


def load_models(folders: Sequence[str | Path], folds: Sequence[str] | None = None) -> list[ReportedModel]:
    """Read all model folders, or refuse before any work.

    Args:
        folders: model folders of nnU-Net, ``TRAINER__PLANS__CONFIGURATION``.
        folds: which folds; default: the numbered ones that are there, else ``all``.

    Raises:
        FileNotFoundError: a folder, file or fold is missing.
        ValueError: a folder is named twice, or one of its files cannot be used.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("-m names a model folder twice")
    letters = [chr(ord("A") + index) if index < 26 else str(index + 1) for index in range(len(paths))]
    return [load_model(path, letter, folds) for path, letter in zip(paths, letters, strict=True)]


def load_model(folder: Path, letter: str = "A", folds: Sequence[str] | None = None) -> ReportedModel:
    """Read one model folder; arguments and errors as in `load_models`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; -m takes a model folder, TRAINER__PLANS__CONFIGURATION")
    remedy = f"{folder} is no complete model folder of nnU-Net; check -m."
    plans = load_json(folder / "plans.json", remedy)
    task = load_task(folder / "dataset.json", folder / "plans.json")
    names = _fold_names(folder, folds)
    loaded = [_load_fold(folder / f"fold_{name}", name) for name in names]
    trainer, configuration = _identity(folder, [origin for _, origin in loaded])
    try:
        str(plans["dataset_name"])
        planned = PlansManager(plans).get_configuration(configuration)
        planned.patch_size, planned.batch_size, planned.spacing  # noqa: B018  # fail here, not in the middle of the page
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"nnU-Net cannot use {folder / 'plans.json'} for the configuration {configuration}: "
            f"{type(error).__name__}: {error}. Check -m."
        ) from error
    calibration, problems = _optional_json(folder / CALIBRATION)
    return ReportedModel(
        folder, letter, trainer, configuration, plans, planned, task, tuple(fold for fold, _ in loaded),
        calibration or None, tuple(problems),
    )  # fmt: skip


def display_names(models: Sequence[ReportedModel]) -> list[str]:
    """Trainer names, with as much of plans, configuration and path as tells the models apart."""
    trainers = [m.trainer for m in models]
    folders = [m.folder.resolve().parts for m in models]
    for names in (trainers, *(["/".join(p[-depth:]) for p in folders] for depth in (1, 2, 3))):
        if len(set(names)) == len(names):
            return names
    return [str(m.folder.resolve()) for m in models]


def _fold_names(folder: Path, wanted: Sequence[str] | None) -> list[str]:
    there = sorted((p.name.removeprefix("fold_") for p in folder.glob("fold_*") if p.is_dir()), key=_fold_order)
    if not there:
        raise FileNotFoundError(f"{folder} has no folder fold_X: nothing was trained there. Check -m.")
    if not wanted:
        return [name for name in there if name.isdecimal()] or there
    absent = [name for name in wanted if name not in there]
    if absent:
        raise FileNotFoundError(f"{folder} has no fold {', '.join(absent)}; there are: {', '.join(there)} (-f)")
    return list(dict.fromkeys(wanted))


def _fold_order(name: str) -> tuple[bool, int, str]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _identity(folder: Path, origins: Sequence[tuple[str, str] | None]) -> tuple[str, str]:
    """Trainer and configuration, from the folder's name or, where it was renamed, from a checkpoint."""
    parts = folder.resolve().name.split("__")
    if len(parts) == 3:
        return parts[0], parts[2]
    for origin in origins:
        if origin is not None:
            return origin
    raise ValueError(
        f"{folder} is not called TRAINER__PLANS__CONFIGURATION, and no checkpoint in it says what it is. Check -m."
    )


def _load_fold(folder: Path, name: str) -> tuple[Fold, tuple[str, str] | None]:
    """The fold, and trainer and configuration that its checkpoint names."""
    problems: list[str] = []
    file = next((folder / c for c in CHECKPOINTS if (folder / c).is_file()), None)
    logging: Mapping[str, Any] = {}
    origin = None
    if file is None:
        problems.append(f"Fold {name} has no checkpoint: its training curves are not shown.")
    else:
        try:
            content = read_safely(file)
            curves = content.get("logging")
            logging = curves if isinstance(curves, dict) else {}
            origin = str(content["trainer_name"]), str(content["init_args"]["configuration"])
        except CheckpointError as error:
            problems.append(f"Fold {name}: {error}")
        except (AttributeError, KeyError, TypeError):
            problems.append(f"Fold {name}: {file.name} does not name its trainer and configuration.")
        if file.name != CHECKPOINTS[0]:
            problems.append(
                f"Fold {name} has not finished its training ({CHECKPOINTS[0]} is missing): the curves end where "
                f"{file.name} was written."
            )
    debug, unreadable = _optional_json(folder / "debug.json")
    problems += unreadable
    checkpoint = "" if file is None else file.name
    return Fold(name, folder, checkpoint, logging, debug, _log_facts(folder), tuple(problems)), origin


def _optional_json(file: Path) -> tuple[Mapping[str, Any], list[str]]:
    if not file.is_file():
        return {}, []
    try:
        content = load_json(file, "")
    except (OSError, ValueError) as error:
        return {}, [str(error)]
    return (content, []) if isinstance(content, dict) else ({}, [f"{file} does not hold a JSON object."])


def _log_facts(folder: Path) -> dict[str, str]:
    """Dates and numbers of cases from nnU-Net's training logs; a resumed training has several."""
    text = ""
    for file in sorted(folder.glob("training_log_*.txt")):
        try:
            text += file.read_text(encoding="utf-8", errors="replace") + "\n"
        except OSError:
            continue
    facts = {}
    stamps = _STAMP.findall(text)
    if stamps:
        facts |= {"started": stamps[0], "ended": stamps[-1]}
    split, pool = _SPLIT.findall(text), _POOL.findall(text)
    if split:
        facts["cases"] = f"{split[-1][0]} training, {split[-1][1]} validation"
        if pool:
            facts["cases"] += f", {pool[-1][1]} training without labels"
    return facts
