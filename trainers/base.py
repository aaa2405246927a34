"""Base of the methods' trainers: losses by name, safe checkpoints, an optional EMA teacher; all else is nnU-Net's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, autocast, nn
from torch.nn.utils import clip_grad_norm_

from nnunet_diffext.checkpoints import CheckpointError, read_safely, write_checkpoint
from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.files import FINAL
from nnunet_diffext.losses.segmentation import dice_ce_loss
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.settings import LABELS_KEY, PLANS_KEY
from nnunet_diffext.trainers.configured import CUDA, ConfiguredTrainer
from nnunet_diffext.trainers.precision import check_bfloat16

MAX_NORM = 12  # of the gradient, as in nnU-Net
MAX_BAD_STEPS = 50  # in a row, with non-finite gradients; then a training is given up


class DiffextTrainer(ConfiguredTrainer):
    """A method implements :meth:`compute_losses`, :meth:`loss_weights` and ``build_network_architecture``."""

    reference: ClassVar[str] = ""
    """Citation printed into the training log."""

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.teacher: nn.Module | None = None
        self.bad_steps = self.bad_steps_in_a_row = self._bad_steps_said = 0
        labels = self.label_manager
        self.label_space = LabelSpace(labels.num_segmentation_heads, labels.has_regions, labels.ignore_label)
        self.plans_manager.plans[PLANS_KEY][LABELS_KEY] = asdict(self.label_space)
        if self.reference:
            self.print_to_log_file(f"Please also cite: {self.reference}\n", add_timestamp=False)

    # ------------------------------------------------------------------ what a method implements
    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scalar losses by name for one batch, already on the device. Every trainable parameter must be reached."""
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss in the sum; 1 for names that are not listed."""
        return {}

    @classmethod
    def from_dataset(cls, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that ``dataset.json`` decides, without which the network cannot be built."""
        return {}

    # ------------------------------------------------------------------ building
    @classmethod
    def read_plans(cls, plans_manager: Any, configuration_manager: Any) -> tuple[Any, LabelSpace, Architecture]:
        """Settings, label space and architecture, all that ``build_network_architecture`` may rely on."""
        blocks = plans_manager.plans.get(PLANS_KEY, {})
        if LABELS_KEY not in blocks:
            raise ValueError(
                f"The plans hold no '{PLANS_KEY}.{LABELS_KEY}' block: no {cls.base_name} training wrote them. "
                "Use the plans.json inside the model folder."
            )
        architecture = Architecture.from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
        )
        return cls.Settings.resolve(blocks.get(cls.base_name), {}), LabelSpace(**blocks[LABELS_KEY]), architecture

    def initialize(self) -> None:
        """nnU-Net's initialisation, after the checks that must not cost the user any training time."""
        if not self.was_initialized:
            Architecture.from_plans(
                self.configuration_manager.network_arch_class_name,
                self.configuration_manager.network_arch_init_kwargs,
                self.configuration_manager.network_arch_init_kwargs_req_import,
            ).check_patch(self.configuration_manager.patch_size)
            if self.device.type == "cpu" and self.settings.cpu_bfloat16:
                c = self.configuration_manager
                check_bfloat16(c.patch_size, c.pool_op_kernel_sizes)
        super().initialize()

    def _do_i_compile(self) -> bool:
        # forward draws noise and returns tuples: torch.compile would recompile at every change of mode
        return False

    def _build_loss(self) -> Any:
        """Loss of the online validation (nnU-Net's ``validation_step``): the same Dice + CE that trains the network."""
        return self.segmentation_loss_on_target

    def segmentation_loss_on_target(self, logits: Tensor, target: Tensor) -> Tensor:
        """``L_seg`` against an nnU-Net target ``(B, 1 or R, *)``."""
        onehot, valid = self.label_space.encode(target)
        return self.segmentation_loss(logits, onehot, valid)

    def segmentation_loss(
        self, logits: Tensor, onehot: Tensor, weight: Tensor, pool: bool = False, dice_weight: float = 1.0
    ) -> Tensor:
        """``L_seg``; arguments as :func:`dice_ce_loss`. Dice is pooled over the batch if planned so, or if ``pool``."""
        return dice_ce_loss(
            logits, onehot, weight,
            regions=self.label_space.regions, batch_dice=self.configuration_manager.batch_dice or pool,
            dice_weight=dice_weight,
        )  # fmt: skip

    @property
    def module(self) -> nn.Module:
        """The network without its DDP wrapper."""
        return self.network.module if self.is_ddp else self.network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """The networks of this package have no deep supervision."""

    # ------------------------------------------------------------------ training
    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Move the tensors of a batch to the training device."""
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def autocast(self) -> Any:
        """Mixed precision as in nnU-Net on CUDA; bfloat16 on a CPU if the settings say so (token ``bf16``)."""
        if self.device.type == "cuda":
            return autocast("cuda", enabled=True)
        if self.device.type == "cpu" and self.settings.cpu_bfloat16:
            return autocast("cpu", dtype=torch.bfloat16)
        return dummy_context()

    def train_step(self, batch: dict) -> dict:
        """One optimisation step on the weighted sum of the losses; a step with non-finite gradients is skipped."""
        batch = self.on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.compute_losses(batch)
        weights = self.loss_weights()
        total = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())

        scaler = self.grad_scaler
        (scaler.scale(total) if scaler is not None else total).backward()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = self.clip_gradients()
        if scaler is not None:
            scaler.step(self.optimizer)  # skips non-finite gradients itself
            scaler.update()
        elif torch.isfinite(norm):
            self.optimizer.step()
        self._count_bad_step(bool(torch.isfinite(norm)), losses)
        self.update_teacher()
        self._steps_this_epoch += 1
        report = {name: loss.detach().float().cpu().numpy() for name, loss in losses.items()}
        return {"loss": total.detach().float().cpu().numpy(), **report}

    def clip_gradients(self) -> Tensor:
        """Limit the norm of the gradient; returns what it was."""
        return clip_grad_norm_(self.network.parameters(), MAX_NORM)

    def _count_bad_step(self, finite: bool, losses: Mapping[str, Tensor]) -> None:
        if finite:
            self.bad_steps_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        if self.bad_steps_in_a_row >= MAX_BAD_STEPS:
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            lower = f"lr{self.initial_lr / 10:.0e}"
            raise FloatingPointError(
                f"{MAX_BAD_STEPS} steps in a row had non-finite gradients (losses of the last one: {values}). "
                f"Lower the learning rate (token {lower}) and check the images for extreme values; "
                f"checkpoints, if any, are in {self.output_folder}."
            )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's logging, plus one curve per loss."""
        super().on_train_epoch_end(train_outputs)
        parts = {k: float(np.nanmean([o[k] for o in train_outputs])) for k in train_outputs[0] if k != "loss"}
        for name, value in parts.items():
            self._log(f"train_{name}", value)
        self.print_to_log_file("losses", ", ".join(f"{k} {v:.4f}" for k, v in parts.items()))
        if self.bad_steps > self._bad_steps_said and self.grad_scaler is None:  # a scaler skips steps as a rule
            self.print_to_log_file(f"WARNING: {self.bad_steps} steps with non-finite gradients were skipped so far.")
            self._bad_steps_said = self.bad_steps

    def _log(self, key: str, value: float) -> None:
        """Log a key that nnU-Net's logger does not know; epochs before its first value are filled with NaN."""
        curves = self.logger.local_logger.my_fantastic_logging
        curves.setdefault(key, [float("nan")] * self.current_epoch)
        self.logger.log(key, value, self.current_epoch)

    # ------------------------------------------------------------------ EMA teacher
    def start_teacher(self) -> nn.Module:
        """A frozen copy of the network in eval mode, outside ``self.network`` and its ``network_weights``.

        Settings of a trainer that starts one hold ``ema_decay``.
        """
        self.teacher = deepcopy(self.module).eval().requires_grad_(False)
        return self.teacher

    def ema_decay_at(self, step: int) -> float:
        """d, before it has grown to ``ema_decay``: the plain mean of all steps (Tarvainen and Valpola 2017)."""
        return 1 - 1 / (step + 2)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """``teacher = d teacher + (1 - d) student``."""
        if self.teacher is None:
            return
        decay = min(self.ema_decay_at(self.global_step), self.settings.ema_decay)
        # not state_dict(): dynamic-network-architectures registers convolutions twice, which would average them twice
        for mean, value in zip(self.teacher.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for mean, value in zip(self.teacher.buffers(), self.module.buffers(), strict=True):
            mean.copy_(value)

    # ------------------------------------------------------------------ checkpoints
    def extra_checkpoint(self) -> dict[str, Any]:
        """What a resumed training needs beyond nnU-Net's checkpoint."""
        extra: dict[str, Any] = {"diffext_bad_steps": self.bad_steps, "diffext_rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            extra["diffext_cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.teacher is not None:
            extra["diffext_teacher"] = self.teacher.state_dict()
        return extra

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint plus ours, written atomically. Only a failed final write ends the training."""
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)  # type: ignore[arg-type]  # torch.save takes a file object as well
        if not buffer.tell():
            return  # not rank 0, or checkpointing is disabled
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)  # our own bytes
        checkpoint.update(self.extra_checkpoint())
        try:
            write_checkpoint(checkpoint, filename)
        except CheckpointError as error:
            if filename.endswith(FINAL):
                raise
            self.print_to_log_file(f"WARNING: {error} Training goes on.")

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore a training. The file is read without executing anything before nnU-Net reads it again."""
        checkpoint = read_safely(filename_or_checkpoint)
        self._check_same_network(checkpoint, filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        self.restore_extra(checkpoint)

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Counterpart of :meth:`extra_checkpoint`."""
        self.bad_steps = checkpoint.get("diffext_bad_steps", 0)
        if "diffext_rng" in checkpoint and self.local_rank == 0:  # the ranks must go on drawing different noise
            torch.set_rng_state(checkpoint["diffext_rng"])
        if "diffext_cuda_rng" in checkpoint and self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["diffext_cuda_rng"], self.device)
        if self.local_rank > 0:  # the file holds the state of rank 0
            torch.manual_seed(torch.initial_seed() + self.local_rank + 1_000_003 * self.current_epoch)
        if "diffext_teacher" in checkpoint:
            self.start_teacher().load_state_dict(checkpoint["diffext_teacher"])

    def _check_same_network(self, checkpoint: Mapping[str, Any], filename: str) -> None:
        if checkpoint.get("trainer_name") != self.__class__.__name__:
            raise CheckpointError(
                f"{filename} was written by {checkpoint.get('trainer_name')}, not by {self.__class__.__name__}. "
                "Continue with the trainer name that started the training."
            )
        if not self.was_initialized:
            self.initialize()
        weights = self.module.state_dict(), checkpoint["network_weights"]
        here, there = ({k: v.shape for k, v in w.items()} for w in weights)
        if here != there:
            different = [k for k in (here | there) if here.get(k) != there.get(k)]
            raise CheckpointError(
                f"{filename} holds another network: {len(different)} of its parameters differ in shape, are missing or "
                f"superfluous (the first is {different[0]}). Were the plans changed after the training was started?"
            )

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return self.global_step / (self.num_epochs * self.num_iterations_per_epoch)

    @property
    def global_step(self) -> int:
        """Number of finished training steps, in whole epochs before this one plus those of this epoch."""
        return self.current_epoch * self.num_iterations_per_epoch + self._steps_this_epoch

    def on_train_epoch_start(self) -> None:
        """Reset the step counter of the epoch."""
        self._steps_this_epoch = 0
        super().on_train_epoch_start()

    _steps_this_epoch = 0
