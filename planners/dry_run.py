"""A trainer of this package that takes training steps on synthetic batches, without dataset, result folder or log."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.planners.memory import StepMemory, count_step, forget_data, measure_step
from nnunet_diffext.settings import LABELS_KEY, PLANS_KEY
from nnunet_diffext.trainers.base import DiffextTrainer


class DryRun:
    """The real training step of a trainer class, for one configuration of a plans dictionary.

    Args:
        trainer_class: a :class:`DiffextTrainer`, with or without variant tokens.
        plans: a plans dictionary; it is not changed.
        configuration: its name.
        dataset_json: content of ``dataset.json``.
        device: of the network. Batches are made there, too.
        data: with real tensors; otherwise the network is on the meta device, for :func:`estimate`.
    """

    def __init__(
        self,
        trainer_class: type[DiffextTrainer],
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        device: torch.device | None = None,
        *,
        data: bool = True,
    ) -> None:
        self.device = device or torch.device("cpu")
        plans = deepcopy(dict(plans))
        labels = PlansManager(plans).get_label_manager(dict(dataset_json))
        space = LabelSpace(labels.num_segmentation_heads, labels.has_regions, labels.ignore_label)
        blocks = plans.setdefault(PLANS_KEY, {})
        settings = trainer_class.Settings.resolve(blocks.get(trainer_class.base_name), trainer_class.overrides)
        settings = replace(settings, **trainer_class.from_dataset(dataset_json))
        blocks[trainer_class.base_name] = settings.as_dict()
        blocks[LABELS_KEY] = asdict(space)
        manager = PlansManager(plans)
        self.configuration = manager.get_configuration(configuration)
        self.channels = determine_num_input_channels(manager, self.configuration, dict(dataset_json))
        build = trainer_class.build_network_architecture
        arguments = (manager, self.configuration, self.channels, space.num_heads)
        with torch.device(self.device if data else "meta"):
            self.network: nn.Module = build(*arguments)
            # built instead of copied: tensors without data cannot be copied deeply
            self.teacher: nn.Module | None = build(*arguments) if getattr(settings, "ema_decay", 0) > 0 else None
        self.network.train()
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        if data:
            for network in (self.network, *([self.teacher] if self.teacher is not None else [])):
                network.to(self.device)
        self.trainer = self._trainer(trainer_class, settings, space)
        group = self.trainer.optimizer.param_groups[0]
        self.moments: int = 2 if "betas" in group else int(group["momentum"] > 0)

    def _trainer(self, trainer_class: type[DiffextTrainer], settings: Any, space: LabelSpace) -> DiffextTrainer:
        # nnUNetTrainer's constructor makes a result folder, a log file and, if configured, a Weights & Biases run
        trainer = trainer_class.__new__(trainer_class)
        trainer.device, trainer.is_ddp, trainer.local_rank = self.device, False, 0
        trainer.settings, trainer.label_space, trainer.configuration_manager = settings, space, self.configuration
        trainer.network, trainer.teacher = self.network, self.teacher
        trainer.initial_lr, trainer.weight_decay = settings.initial_lr, settings.weight_decay
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.current_epoch = (
            settings.epochs, settings.iterations, 0,
        )  # fmt: skip
        trainer.bad_steps = trainer.bad_steps_in_a_row = 0
        # a scale that overflows would skip the first steps, and with them the momentum
        trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=1.0) if self.device.type == "cuda" else None
        trainer.optimizer, _ = trainer.configure_optimizers()
        return trainer

    def batch(self) -> dict[str, Tensor]:
        """What the data loaders deliver: labelled patches, and as many unlabelled ones in two views."""
        shape = (self.configuration.batch_size, self.channels, *self.configuration.patch_size)
        space = self.trainer.label_space
        target = torch.zeros(shape[0], space.target_channels, *shape[2:], dtype=torch.int16, device=self.device)
        return {
            "data": torch.randn(shape, device=self.device),
            "target": target.bool() if space.regions else target,
            "unlabeled": torch.randn(shape[0], 2 * shape[1], *shape[2:], device=self.device),
        }

    def losses(self) -> Tensor:
        """The weighted sum of the losses on a new batch, in the mixed precision of a GPU."""
        # CPU autocast, since these tensors live on the CPU: the same operations in the same types as on a GPU, but for
        # interpolation, which the CPU does in fp32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = self.trainer.compute_losses(self.batch())
        weights = self.trainer.loss_weights()
        return sum(weights.get(name, 1.0) * loss for name, loss in losses.items())

    def train(self) -> None:
        """One complete training step."""
        self.trainer.train_step(self.batch())


def estimate(
    trainer_class: type[DiffextTrainer], plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> StepMemory:
    """What a training step would need on a GPU, counted on tensors without data. Arguments as for :class:`DryRun`."""
    step = DryRun(trainer_class, plans, configuration, dataset_json, data=False)
    with FakeTensorMode():
        forget_data(step.network)
        if step.teacher is not None:
            forget_data(step.teacher)
        return count_step(step)


def measure(
    trainer_class: type[DiffextTrainer],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    device: torch.device,
) -> StepMemory | None:
    """What a training step needs on this GPU, ``None`` if it does not fit. Arguments as for :class:`DryRun`."""

    def build(where: torch.device) -> DryRun:
        return DryRun(trainer_class, plans, configuration, dataset_json, where)

    return measure_step(build, device)
