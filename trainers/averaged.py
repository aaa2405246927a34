"""Trainings whose result is an exponential moving average of all weights, as usual for diffusion models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nnunet_diffext.trainers.base import DiffextTrainer


class AveragedTrainer(DiffextTrainer):
    """The average is what is validated and what ``network_weights`` of a checkpoint holds; training goes on without it.

    Everything is averaged together: an averaged denoiser would meet features that it was never trained on. The settings
    of a subclass hold ``ema_decay``; 0 switches the average off.
    """

    def on_train_start(self) -> None:
        """Start the average, unless a checkpoint has brought one."""
        super().on_train_start()
        if self.settings.ema_decay > 0 and self.teacher is None:
            self.start_teacher()

    def ema_decay_at(self, step: int) -> float:
        """The average spans about the last tenth of the steps, however short the training."""
        return (1 + step) / (10 + step)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The network has the averaged weights inside this block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.teacher is None:
            return
        pairs = [*zip(self.teacher.parameters(), self.module.parameters(), strict=True)]
        pairs += zip(self.teacher.buffers(), self.module.buffers(), strict=True)
        for mean, value in pairs:
            mean.data, value.data = value.data, mean.data

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, with the averaged weights."""
        with self.averaged_weights():
            return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, with the averaged weights."""
        with self.averaged_weights():
            super().perform_actual_validation(save_probabilities)

    def save_checkpoint(self, filename: str) -> None:
        """The average becomes ``network_weights``; what is trained on lies beside it, where the average is now."""
        with self.averaged_weights():
            super().save_checkpoint(filename)

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Put both where they belong."""
        super().restore_extra(checkpoint)
        self._exchange()
