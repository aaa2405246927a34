"""AdamW with a linear warm-up, as the diffusion papers train, in nnU-Net's loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunet_diffext.settings import MethodSettings, setting
from nnunet_diffext.trainers.base import DiffextTrainer


@dataclass(frozen=True, kw_only=True)
class AdamSettings(MethodSettings):
    """Settings of trainers that optimise with AdamW."""

    initial_lr: float = setting(1e-3, "initial learning rate of AdamW, decayed with power 0.9", number="lr#", minimum=0)
    weight_decay: float = setting(0.0, "weight decay of AdamW", number="wd#", minimum=0)
    momentum: float = setting(0.9, "beta_1 of AdamW", number="momentum#", minimum=0, maximum=0.9999)
    warmup: int = setting(100, "iterations over which the learning rate rises linearly", number="warmup#", minimum=0)
    lr_decay: str = setting(
        "poly", "what becomes of the learning rate after the warm-up; 'poly' as in nnU-Net",
        choices=("poly", "cosine", "constant"), switches={"cosineLR": "cosine", "constantLR": "constant"},
    )  # fmt: skip


class CosineLRScheduler(PolyLRScheduler):
    """Half a cosine from the initial learning rate to zero, one step per epoch."""

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of an epoch (default: the next one)."""
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        rate = self.initial_lr * (1 + math.cos(math.pi * current_step / self.max_steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class AdamTrainer(DiffextTrainer):
    """Replaces nnU-Net's SGD. The settings of a subclass are :class:`AdamSettings`."""

    def trainable(self) -> Iterable[nn.Parameter]:
        """Parameters to optimise: those of the network that are not frozen."""
        return (p for p in self.network.parameters() if p.requires_grad)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW, with nnU-Net's decay or another."""
        s = self.settings
        betas = (s.momentum, 0.999)
        optimizer = torch.optim.AdamW(self.trainable(), self.initial_lr, betas=betas, weight_decay=s.weight_decay)
        return optimizer, self.scheduler_of(optimizer)

    def scheduler_of(self, optimizer: torch.optim.Optimizer) -> PolyLRScheduler:
        """What the settings want to become of the learning rate."""
        decay = self.settings.lr_decay
        if decay == "cosine":
            return CosineLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        return PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, 0.0 if decay == "constant" else 0.9)

    def train_step(self, batch: dict) -> dict:
        """One step; during the warm-up with a smaller learning rate."""
        factor = min(1.0, (self.global_step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        scheduled = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        try:
            return super().train_step(batch)
        finally:
            for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
                group["lr"] = lr
