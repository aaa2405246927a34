"""LEAF's teacher: a pretrained vision transformer, or a masked autoencoder that was trained on the same images."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.data.dataset import channel_names
from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.networks.swin_teacher import SwinTeacher
from nnunet_diffext.pretrained.vision import VARIABLE, PatchTeacher, load_teacher
from nnunet_diffext.settings import PLANS_KEY
from nnunet_diffext.stages import StageError
from nnunet_diffext.trainers.base import DiffextTrainer
from nnunet_diffext.trainers.staged import build_network_of, fitting_stage, load_weights

OWN = "M4oEPretrainTrainer"
"""Trainer of masked autoencoders."""

Teacher = PatchTeacher | SwinTeacher


def find_teacher(trainer: DiffextTrainer, name: str) -> Teacher:
    """The frozen network whose features are imitated, never one with random weights.

    Args:
        trainer: the training that asks.
        name: a model of timm (see :func:`load_teacher`), or a variant of :data:`OWN` on the same dataset, plans,
            configuration and fold. A model folder in ``nnUNet_diffext_teacher`` is such a training, too.
    Raises:
        PretrainedError, StageError, CheckpointError: there is none; the message says where one comes from.
    """
    given = os.environ.get(VARIABLE, "")
    if name.split("_")[0] == OWN or (given and (Path(given) / "plans.json").is_file()):
        return _own_teacher(trainer, name)
    return load_teacher(name)


def _own_teacher(trainer: DiffextTrainer, name: str) -> SwinTeacher:
    configuration = _of_images(trainer)
    try:
        stage = fitting_stage(trainer, "teacher", name, configuration)
    except StageError as error:
        raise StageError(f"{error}\n Or train without a teacher: token noAlign.") from error
    if stage.trainer_name.split("_")[0] != OWN:
        raise StageError(
            f"{stage.folder} was trained by {stage.trainer_name}, which is no masked autoencoder of images. "
            f"Let {VARIABLE} name a training of {OWN}, or the weights of a vision transformer."
        )
    modalities = modalities_of(trainer.dataset_json)
    known = stage.plans[PLANS_KEY][OWN]["modalities"]
    if tuple(known) != modalities.names:
        raise StageError(
            f"{stage.folder} knows the modalities {', '.join(known)}; this training is on "
            f"{', '.join(modalities.names)}. Repeat the pre-training on this dataset, or train without a teacher: "
            "token noAlign."
        )
    plans = PlansManager(dict(stage.plans))
    heads = plans.get_label_manager(trainer.dataset_json).num_segmentation_heads
    channels = len(channel_names(trainer.dataset_json))
    autoencoder = build_network_of(stage.trainer_name, plans, plans.get_configuration(configuration), channels, heads)
    load_weights(autoencoder, stage)
    trainer.print_to_log_file(f"Teacher: {stage.folder}, fold {stage.fold}.")
    return SwinTeacher(autoencoder, modalities.index)


def _of_images(trainer: DiffextTrainer) -> str:
    """The configuration without the masks that the second stage of a cascade also sees; they share data and patch."""
    name = trainer.configuration_name
    if trainer.configuration_manager.previous_stage_name is None:
        return name
    return trainer.plans_manager.plans["configurations"][name].get("inherits_from", name)
