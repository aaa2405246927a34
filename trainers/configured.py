"""nnU-Net's trainer, configured by a settings dataclass and a variant name instead of a class per hyper-parameter."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffext.settings import LABELS_KEY, PLANNER_KEY, PLANS_KEY, SettingsError, TrainingSettings
from nnunet_diffext.trainers import TRAINERS

CUDA = torch.device("cuda")


class ConfiguredTrainer(nnUNetTrainer):
    """Resolves the settings once and records them in the plans, which nnU-Net saves in the model folder."""

    Settings: ClassVar[type[TrainingSettings]] = TrainingSettings
    base_name: ClassVar[str] = ""
    overrides: ClassVar[dict[str, Any]] = {}
    """Field values that the variant name stands for (filled in by :func:`nnunet_diffext.trainers.find_trainer`)."""

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        blocks = plans.setdefault(PLANS_KEY, {})
        check_blocks(blocks)
        self.settings = self.Settings.resolve(blocks.get(self.base_name), self.overrides)
        blocks[self.base_name] = self.settings.as_dict()
        super().__init__(plans, configuration, fold, dataset_json, device)

        s = self.settings
        self.initial_lr, self.weight_decay = s.initial_lr, s.weight_decay
        self.num_epochs, self.num_iterations_per_epoch = s.epochs, s.iterations
        self.num_val_iterations_per_epoch = s.val_iterations
        self.save_every = s.save_every
        if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "").isdigit():
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # nnU-Net takes every core of the machine
        if s.seed is not None:
            seed_everything(s.seed + self.local_rank)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's, after a look at what the second stage of a cascade needs.

        Raises:
            FileNotFoundError: cases that the first stage has not segmented, with the command that does it.
        """
        if self.is_cascaded:
            folder = Path(self.folder_with_segs_from_previous_stage)
            cases = sorted({case for part in self.do_split() for case in part})
            missing = [case for case in cases if not any(folder.glob(f"{case}.*"))]
            if missing:
                previous = self.configuration_manager.previous_stage_name
                name, plans = self.plans_manager.dataset_name, self.plans_manager.plans_name
                raise FileNotFoundError(
                    f"{len(missing)} of {len(cases)} cases, the first is {missing[0]}, have no segmentation of "
                    f"{previous} in {folder}. nnU-Net looks for the previous stage under this trainer's own name, "
                    "tokens included; every fold of it segments its validation cases. Train all folds: "
                    f"nnUNetv2_train {name} {previous} FOLD -tr {type(self).__name__} -p {plans}"
                )
        return super().get_dataloaders()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """nnU-Net's SGD with polynomial decay, with the momentum of the settings."""
        optimizer = torch.optim.SGD(
            self.network.parameters(),
            self.initial_lr,
            weight_decay=self.weight_decay,
            momentum=self.settings.momentum,
            nesterov=self.settings.momentum > 0,
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


def check_blocks(blocks: Mapping[str, Any]) -> None:
    """Refuse a misspelt trainer name among the settings of a plans file: its settings would be ignored silently.

    Raises:
        SettingsError: naming the unknown keys and the known ones.
    """
    known = {*TRAINERS, LABELS_KEY, PLANNER_KEY}
    unknown = sorted(set(blocks) - known)
    if unknown:
        raise SettingsError(f"Unknown key(s) {unknown} in the plans' '{PLANS_KEY}' block. Known: {sorted(known)}.")


@contextmanager
def instead(thing: Any, **attributes: Any) -> Iterator[None]:
    """Give a trainer or network other attributes for a while, so that nnU-Net's own methods use them."""
    before = {name: getattr(thing, name) for name in attributes}
    try:
        vars(thing).update(attributes)
        yield
    finally:
        vars(thing).update(before)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch in this process. nnU-Net's augmentation workers stay unseeded."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
