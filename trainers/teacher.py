"""LEAF's teacher: a pretrained vision transformer, or a masked autoencoder that was trained on the same images."""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.data.dataset import channel_names
from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.networks.swin_teacher import SwinTeacher
from nnunet_diffext.pretrained.vision import VARIABLE, PatchTeacher, load_teacher
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
    stage = fitting_stage(trainer, "teacher", name)
    if stage.trainer_name.split("_")[0] != OWN:
        raise StageError(
            f"{stage.folder} was trained by {stage.trainer_name}, which is no masked autoencoder of images. "
            f"Let {VARIABLE} name a training of {OWN}, or the weights of a vision transformer."
        )
    plans = PlansManager(dict(stage.plans))
    heads = plans.get_label_manager(trainer.dataset_json).num_segmentation_heads
    channels = len(channel_names(trainer.dataset_json))
    autoencoder = build_network_of(
        stage.trainer_name, plans, plans.get_configuration(trainer.configuration_name), channels, heads
    )
    load_weights(autoencoder, stage)
    trainer.print_to_log_file(f"Teacher: {stage.folder}, fold {stage.fold}.")
    return SwinTeacher(autoencoder, modalities_of(trainer.dataset_json).index)
