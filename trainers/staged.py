"""Trainings that build on the frozen network of an earlier one: finding it, building it, keeping it in the model."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnunet_diffext.checkpoints import CheckpointError
from nnunet_diffext.settings import LABELS_KEY, PLANNER_KEY, PLANS_KEY
from nnunet_diffext.stages import Stage, StageError, check_fits, find_model_folder, load_stage
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.trainers.base import DiffextTrainer
from nnunet_diffext.variants import UnknownTokenError, split_name


class StagedTrainer(DiffextTrainer):
    """Finds the earlier stage by name or through ``nnUNet_diffext_<stage>`` and loads it into the network.

    The settings of a subclass hold ``<stage>_trainer``; its network has the stage's network as attribute ``<stage>``.
    """

    stage_name: ClassVar[str]
    without_stage: ClassVar[str] = ""
    """What else the user can do, for the end of a message that there is no such stage."""
    stage: Stage | None = None
    _continues = False

    @property
    def builds_on_stage(self) -> bool:
        """Whether the settings ask for the stage at all."""
        return True

    def initialize(self) -> None:
        """Find the stage before anything is built; its weights go into the network."""
        if not self.was_initialized and self.builds_on_stage:
            self._find_stage()
        super().initialize()
        self.load_stage_weights()

    def load_stage_weights(self) -> None:
        """The stage's weights, where it was found; otherwise the checkpoint that is continued holds them."""
        if self.stage is not None:
            load_weights(getattr(self.module, self.stage_name), self.stage)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore a training; the checkpoint brings its stage along, whatever has become of the stage's folder."""
        self._continues = True
        super().load_checkpoint(filename_or_checkpoint)

    def _find_stage(self) -> None:
        blocks = self._recorded_blocks() if self._continues else None
        trainer = None if blocks is None else blocks[self.base_name][self._trainer_key]
        try:
            stage = self._fitting_stage()
        except (StageError, CheckpointError):
            if trainer is None:
                raise
        else:
            if trainer in (None, stage.trainer_name):
                self.stage, trainer = stage, stage.trainer_name
                blocks = stage.plans.get(PLANS_KEY, {}) if blocks is None else blocks
                self.print_to_log_file(f"{self.stage_name.capitalize()}: {stage.folder}, fold {stage.fold}.")
        own = self.plans_manager.plans[PLANS_KEY]
        shared = (self.base_name, LABELS_KEY, PLANNER_KEY)
        own.update({k: v for k, v in blocks.items() if k not in shared})  # it may be one of our own methods
        own[self.base_name][self._trainer_key] = trainer
        self.settings = replace(self.settings, **{self._trainer_key: trainer})

    @property
    def _trainer_key(self) -> str:
        return f"{self.stage_name}_trainer"

    @property
    def _wanted_trainer(self) -> str:
        return getattr(self.settings, self._trainer_key)

    def _fitting_stage(self) -> Stage:
        stage = fitting_stage(self, self.stage_name, self._wanted_trainer, otherwise=self.without_stage)
        self.check_stage(stage)
        return stage

    def check_stage(self, stage: Stage) -> None:
        """Raise ``StageError`` for a training that fits the data, but is of no use here."""
        if stage.trainer_name.split("_")[0] == self.base_name:
            raise StageError(
                f"{stage.folder} was trained by {self.base_name} itself, which cannot be its own {self.stage_name}."
            )

    def _recorded_blocks(self) -> dict[str, Any] | None:
        """Settings in the model folder of the training that is continued or validated."""
        plans = Path(self.output_folder_base) / "plans.json"
        return json.loads(plans.read_text()).get(PLANS_KEY) if plans.is_file() else None


def fitting_stage(
    trainer: DiffextTrainer, name: str, wanted: str, configuration: str | None = None, otherwise: str = ""
) -> Stage:
    """The same fold of an earlier training on the same data, plans and labels.

    Args:
        trainer: the training that builds on it.
        name: of the stage; the variable ``nnUNet_diffext_<name>`` comes first.
        wanted: trainer to look for in ``nnUNet_results``.
        configuration: default: that of the training.
        otherwise: end of the message if there is none.
    Raises:
        StageError: there is none, or it does not fit. CheckpointError: its file is damaged or unsafe.
    """
    plans = trainer.plans_manager.plans
    configuration = configuration or trainer.configuration_name
    names = [trainer.plans_manager.plans_name]
    base = plans[PLANS_KEY].get(PLANNER_KEY, {}).get("base_plans")
    names += [base] if base and base not in names else []
    where = (plans["dataset_name"], configuration, wanted, names, trainer.fold)
    # A stage of this package is of use to the trainer it was made for; a network of nnU-Net may be anybody's.
    own, _ = split_name(wanted, TRAINERS) or ("", [])
    alternatives = "" if own == "nnUNetTrainer" else own
    stage = load_stage(find_model_folder(name, *where, alternatives, otherwise), trainer.fold)
    check_fits(stage, plans, configuration, trainer.dataset_json)
    return stage


def build_network_of(
    trainer_name: str, plans_manager: Any, configuration_manager: Any, input_channels: int, output_channels: int
) -> nn.Module:
    """The network of any trainer that nnU-Net can find, without deep supervision.

    Raises:
        ValueError: no such trainer.
    """
    build = _trainer_class(trainer_name).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, input_channels, output_channels, False)
    c = configuration_manager  # trainers written for nnU-Net before 2.7
    arguments = (c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import)
    return build(*arguments, input_channels, output_channels, False)


def _trainer_class(name: str) -> type:
    if split_name(name, TRAINERS) is not None:
        try:
            return find_trainer(name)
        except UnknownTokenError:
            pass  # nnU-Net has variants of its own, such as nnUNetTrainer_noDummy2DDA
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise ValueError(
            f"The earlier stage was trained by {name}, which nnU-Net cannot find. Install the package it belongs to, "
            "or add its folder to nnUNet_extTrainer."
        ) from error


def load_weights(network: nn.Module, stage: Stage) -> None:
    """Give a network the weights of a finished training.

    Raises:
        StageError: they belong to another network.
    """
    here, there = ({k: tuple(v.shape) for k, v in w.items()} for w in (network.state_dict(), stage.weights))
    different = [k for k in here | there if here.get(k) != there.get(k)]
    if different:
        key = different[0]
        raise StageError(
            f"The weights of {stage.folder}, fold {stage.fold}, do not fit the network that {stage.trainer_name} "
            f"builds from these plans: {len(different)} parameters differ, the first is {key} "
            f"({there.get(key, 'missing')} in the file, {here.get(key, 'missing')} here). Train that stage "
            "with the plans of this training, and with the same tokens for the network's size."
        )
    network.load_state_dict(stage.weights)
