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

from nnunet_diffext.data.modalities import Modalities, modalities_of
from nnunet_diffext.losses.segmentation import merge_unannotated, without_unannotated
from nnunet_diffext.settings import TrainingSettings, setting
from nnunet_diffext.trainers.configured import ConfiguredTrainer, instead


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
    cases: Modalities
    _annotated: Tensor

    def _build_loss(self) -> Callable[[Any, Any], Tensor]:
        """nnU-Net's loss, of what remains when labels without annotation are part of the background."""
        loss = super()._build_loss()
        if not self.settings.mask_unannotated:
            return loss
        self.cases = modalities_of(self.dataset_json)
        if not self.cases.listed:
            self.print_to_log_file(
                "maskUnannotated changes nothing: in this dataset, every label is annotated everywhere."
            )

        def masked(output: Any, target: Any) -> Tensor:
            clean, hidden = self._cleaned(target)
            return loss(self._merged(output, hidden), clean)

        return masked

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's. A case of which nobody knows what was annotated is reported before any work is done."""
        train, val = super().do_split()
        if self.settings.mask_unannotated:
            for case in (*train, *val):
                self.cases.annotated(case)
        return train, val

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's."""
        self._note_annotated(batch)
        return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, without counting labels that nobody looked for."""
        if not self.settings.mask_unannotated:
            return super().validation_step(batch)
        self._note_annotated(batch)
        network, target = self.network, batch["target"]
        levels = [t.to(self.device) for t in target] if isinstance(target, list) else target.to(self.device)
        clean, hidden = self._cleaned(levels)
        with instead(self, network=lambda image: self._merged(network(image), hidden)):
            return super().validation_step({**batch, "target": clean})

    def _note_annotated(self, batch: dict) -> None:
        if self.settings.mask_unannotated:
            rows = [self.cases.annotated(case) for case in batch["keys"]]
            self._annotated = torch.tensor(rows, device=self.device)

    def _cleaned(self, target: Any) -> tuple[Any, Any]:
        """:func:`without_unannotated` of every level of deep supervision."""
        if not isinstance(target, (list, tuple)):
            return without_unannotated(target, self._annotated, regions=self.label_manager.has_regions)
        clean, hidden = zip(*map(self._cleaned, target), strict=True)
        return list(clean), list(hidden)

    def _merged(self, output: Any, hidden: Any) -> Any:
        """:func:`merge_unannotated` of every level of deep supervision."""
        if isinstance(output, (list, tuple)):
            return [self._merged(*level) for level in zip(output, hidden, strict=True)]
        return merge_unannotated(output, self._annotated, regions=self.label_manager.has_regions, hidden=hidden)
