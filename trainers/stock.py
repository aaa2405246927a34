"""``nnUNetTrainer_30epochs_100iters_seed1``: the stock trainer on another budget, which its name records.

This is the baseline to run beside every method: nothing but the numbers in the name differs from nnU-Net, unless the
token ``maskUnannotated`` asks for the loss of partly annotated datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.losses.segmentation import merge_unannotated
from nnunet_diffext.settings import TrainingSettings, setting
from nnunet_diffext.trainers.configured import ConfiguredTrainer


@dataclass(frozen=True, kw_only=True)
class StockSettings(TrainingSettings):
    """Settings of the stock trainer."""

    mask_unannotated: bool = setting(
        False, "labels that nobody looked for in a case (dataset.json) may be anywhere in its background; nnU-Net "
        "itself teaches them as background",
        switches={"maskUnannotated": True},
    )  # fmt: skip


class nnUNetTrainer(ConfiguredTrainer):  # noqa: N801 - nnU-Net's own name, extended by tokens
    """nnU-Net's trainer with the tokens of :class:`StockSettings`."""

    Settings = StockSettings
    base_name = "nnUNetTrainer"
    _annotated: Tensor

    def _build_loss(self) -> Callable[[Any, Any], Tensor]:
        """nnU-Net's loss, of what remains when labels without annotation are part of the background."""
        loss = super()._build_loss()
        if not self.settings.mask_unannotated:
            return loss
        self.cases = modalities_of(self.dataset_json)

        def masked(output: Any, target: Any) -> Tensor:
            levels = output if isinstance(output, (list, tuple)) else [output]
            regions = self.label_manager.has_regions
            merged = [merge_unannotated(level, self._annotated, regions=regions) for level in levels]
            return loss(merged if isinstance(output, (list, tuple)) else merged[0], target)

        return masked

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's."""
        self._note_annotated(batch)
        return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's."""
        self._note_annotated(batch)
        return super().validation_step(batch)

    def _note_annotated(self, batch: dict) -> None:
        if self.settings.mask_unannotated:
            rows = [self.cases.annotated(case) for case in batch["keys"]]
            self._annotated = torch.tensor(rows, device=self.device)
