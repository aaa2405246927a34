"""A trained M4oE model learns another modality: the model with one expert and one head more, ready to be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_diffext.checkpoints import read_safely, write_checkpoint
from nnunet_diffext.data.continued_split import continue_splits
from nnunet_diffext.data.dataset import channel_names, dataset_name, foreground, load_json, preprocessed_folder
from nnunet_diffext.data.modalities import Modalities, ModalityError, modalities_of
from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.files import FINAL, new_folder
from nnunet_diffext.networks.m4oe import extend_weights
from nnunet_diffext.settings import LABELS_KEY, PLANS_KEY
from nnunet_diffext.stages import differences
from nnunet_diffext.trainers import find_trainer

TRAINER = "M4oETrainer"


@dataclass(frozen=True)
class Growth:
    """What was added.

    Attributes:
        folder: of the larger model.
        modality: the new one.
        labels: names of labels that no modality had before.
        parameters: of the model before and after.
        trainer: name to train on with, everything or, with the token ``freezeOld``, what is new.
        configuration: of the model.
        plans: name of its plans.
        folds: what became of ``splits_final.json``, for the user; empty if it was as it should be.
    """

    folder: Path
    modality: str
    labels: tuple[str, ...]
    parameters: tuple[int, int]
    trainer: str
    configuration: str
    plans: str
    folds: str


def add_modality(model_folder: Path, dataset: str | int, output: Path, folds: Sequence[int | str]) -> Growth:
    """Write a model folder that knows one modality more. For the old ones it predicts the same, bit for bit.

    If the dataset has no ``splits_final.json`` yet, it gets one that goes on from that of the model's dataset.

    Args:
        model_folder: of a trained M4oE model.
        dataset: that holds the old modalities and the new one, preprocessed with the plans of the model. Labels and
            modalities that the model knows come first, in its order.
        output: must not exist.
        folds: to extend.
    Raises:
        ValueError: no M4oE model, a dataset that does not continue it, or that validates on what the model was trained
            on, or an output folder that exists.
        FileNotFoundError: something is missing.
        CheckpointError: a damaged or unsafe checkpoint.
    """
    if output.exists():
        raise ValueError(f"{output} exists. Name a folder that does not exist yet.")
    files = (model_folder / name for name in ("plans.json", "dataset.json"))
    plans, old_json = (load_json(file, "Name a model folder with -m.") for file in files)
    if TRAINER not in plans.get(PLANS_KEY, {}):
        raise ValueError(f"{model_folder} is no model of {TRAINER}.")
    name = dataset_name(dataset)
    new_json = load_json(preprocessed_folder(name) / "dataset.json", "Preprocess the dataset first.")
    modality, labels = _continues(plans, old_json, new_json)
    checkpoints = {fold: read_safely(model_folder / f"fold_{fold}" / FINAL) for fold in folds}
    configuration = model_folder.name.rpartition("__")[2]
    configuration = next(iter(checkpoints.values()))["init_args"]["configuration"] or configuration
    _check_preprocessing(plans, name, configuration)
    _check_normalization(old_json, new_json)
    old = _network(plans, old_json, configuration)
    new_plans = _larger(plans, name, new_json, old.experts + 1)
    new = _network(new_plans, new_json, configuration)
    sizes = tuple(sum(p.numel() for p in network.parameters()) for network in (old, new))
    split = continue_splits(plans["dataset_name"], name, folds, plans["plans_name"])
    trainer = ""
    with new_folder(output) as folder:
        for file, content in (("plans.json", new_plans), ("dataset.json", new_json)):
            (folder / file).write_text(json.dumps(content, indent=4))
        for fold, checkpoint in checkpoints.items():
            trainer = _train_on(checkpoint["trainer_name"], new_plans)
            weights = extend_weights(checkpoint["network_weights"], old, new)
            init = {**checkpoint["init_args"], "plans": new_plans, "dataset_json": new_json}
            kept = {k: checkpoint[k] for k in ("trainer_name", "inference_allowed_mirroring_axes", "current_epoch")}
            (folder / f"fold_{fold}").mkdir()
            write_checkpoint({**kept, "init_args": init, "network_weights": weights}, folder / f"fold_{fold}" / FINAL)
    return Growth(output, modality, labels, sizes, trainer, configuration, plans["plans_name"], split)


def _continues(
    plans: Mapping[str, Any], old_json: Mapping[str, Any], new_json: Mapping[str, Any]
) -> tuple[str, tuple[str, ...]]:
    """The new modality and the new labels of a dataset.

    Raises:
        ModalityError: it does not go on where the model ends.
    """
    known: dict[str, list[bool]] = plans[PLANS_KEY][TRAINER]["modalities"]
    cases: Modalities = modalities_of(new_json)
    if list(cases.names[:-1]) != list(known):
        raise ModalityError(
            f"The model knows the modalities {', '.join(known)}; the dataset has {', '.join(cases.names)}. One more is "
            "needed, behind those of the model in their order: merge the same datasets again, and the new one last."
        )
    old_labels, new_labels = (list(foreground(j)) for j in (old_json, new_json))
    if new_labels[: len(old_labels)] != old_labels:
        raise ModalityError(
            f"The model's labels are {', '.join(old_labels)}; the dataset's are {', '.join(new_labels)}. They must "
            "begin in the same way: merge the same datasets again, and the new one last."
        )
    for name, heads in known.items():
        now = list(cases.classes(name))
        if now[: len(heads)] != heads or any(now[len(heads) :]):
            raise ModalityError(
                f"In the dataset, other labels are annotated for {name} than those that the model learned for it. "
                "Only the new modality may bring labels."
            )
    return cases.names[-1], tuple(new_labels[len(old_labels) :])


def _check_preprocessing(plans: Mapping[str, Any], name: str, configuration: str) -> None:
    """Raise ``ModalityError`` if the dataset does not have the plans of the model: its data would not fit."""
    plans_name = plans["plans_name"]
    file = preprocessed_folder(name) / f"{plans_name}.json"
    if file.is_file():
        here = load_json(file, "Move the plans of the model there again.")
        known = configuration in here["configurations"]
        wrong = differences(plans, here, configuration) if known else f"{configuration} is missing"
    else:
        wrong = f"there is no {file}"
    if wrong:
        source, target = plans["dataset_name"], name
        raise ModalityError(
            f"{name} does not have the plans of the model: {wrong}. Give it those and preprocess it with them:\n"
            f"  nnUNetv2_move_plans_between_datasets -s {source} -t {target} -sp {plans_name}\n"
            f"  nnUNetv2_preprocess -d {target} -plans_name {plans_name} -c {configuration}"
        )


def _check_normalization(old_json: Mapping[str, Any], new_json: Mapping[str, Any]) -> None:
    """Raise ``ModalityError`` if nnU-Net would normalise the new dataset in another way than the model's plans do."""
    for old, new in zip(channel_names(old_json), channel_names(new_json), strict=False):
        here, there = (get_normalization_scheme(name).__name__ for name in (old, new))
        if here != there:
            raise ModalityError(
                f"The model's images are normalised for the channel {old!r} ({here}), which does not suit {new!r} "
                f"({there}) of the dataset: its plans would be applied to the new modality, too. Train a new model on "
                "the merged dataset instead."
            )


def _larger(plans: Mapping[str, Any], name: str, dataset_json: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """The model's plans for the new dataset and so many experts."""
    larger = {**deepcopy(dict(plans)), "dataset_name": name}
    settings = larger[PLANS_KEY][TRAINER]
    settings.update(find_trainer(TRAINER).from_dataset(dataset_json))
    settings["experts"] = None if experts == len(settings["modalities"]) else experts
    labels = PlansManager(larger).get_label_manager(dict(dataset_json))
    space = LabelSpace(labels.num_segmentation_heads, labels.has_regions, labels.ignore_label)
    larger[PLANS_KEY][LABELS_KEY] = vars(space).copy()
    return larger


def _train_on(trainer: str, plans: Mapping[str, Any]) -> str:
    """Name of the trainer whose network is the larger one, and which starts from it."""
    base, *tokens = trainer.split("_")
    tokens = [t for t in tokens if t not in ("noMAE", "freezeOld") and not re.fullmatch(r"experts\d+", t)]
    experts = plans[PLANS_KEY][TRAINER]["experts"]
    return "_".join([base, *tokens, *([f"experts{experts}"] if experts else [])])


def _network(plans: dict[str, Any], dataset_json: Mapping[str, Any], configuration: str) -> nn.Module:
    manager = PlansManager(deepcopy(plans))
    chosen = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, chosen, dict(dataset_json))
    heads = plans[PLANS_KEY][LABELS_KEY]["num_heads"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the new head
        return find_trainer(TRAINER).build_network_architecture(manager, chosen, channels, heads)
