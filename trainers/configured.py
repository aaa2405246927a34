"""nnU-Net's trainer, configured by a settings dataclass and a variant name instead of a class per hyper-parameter."""

from __future__ import annotations

import json
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

    def on_train_start(self) -> None:
        """nnU-Net's, which writes the settings over those of the other folds: all folds of a model share them.

        Raises:
            SettingsError: another fold was trained with other ones, and could not be predicted with any more.
        """
        if not self.was_initialized:
            self.initialize()
        model = Path(self.output_folder_base)
        others = [f.parent.name for f in model.glob("fold_*/checkpoint_*.pth") if f.parent != Path(self.output_folder)]
        if others and (model / "plans.json").is_file():
            before = json.loads((model / "plans.json").read_text()).get(PLANS_KEY, {}).get(self.base_name, {})
            now = json.loads(json.dumps(self.plans_manager.plans[PLANS_KEY][self.base_name]))
            different = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
            if different:
                key = different[0]
                raise SettingsError(
                    f"{model} holds {others[0]}, trained with other settings: {', '.join(different)} ({key} was "
                    f"{before[key]!r}, now {now[key]!r}). Folds of a model share them. Train this fold as that one "
                    "was, or move the old model away and train all folds again."
                )
        super().on_train_start()

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
