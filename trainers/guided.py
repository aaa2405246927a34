"""Trainings around the frozen network of an earlier one: finding it, and priors that err as they will on new images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunet_diffext.checkpoints import CheckpointError
from nnunet_diffext.data.prior_errors import ErrorSample, PriorError
from nnunet_diffext.data.splits import load_split, number_of_folds
from nnunet_diffext.settings import LABELS_KEY, PLANNER_KEY, PLANS_KEY
from nnunet_diffext.stages import FINAL, Stage, StageError, check_fits, find_model_folder, load_stage
from nnunet_diffext.trainers.base import DiffextTrainer
from nnunet_diffext.trainers.priors import (
    BLIND_STRENGTH,
    TRUSTED,
    PriorBank,
    build_prior,
    load_prior,
    out_of_fold,
)

PRIOR_KINDS = ("auto", "oof", "corrupted", "insample")
MEASURED_BATCHES = 8


class GuidedTrainer(DiffextTrainer):
    """Adds ``self.module.prior``, found by name or through ``nnUNet_diffext_prior``, and :meth:`training_prior`.

    The settings of a subclass hold ``guided``, ``prior_trainer``, ``prior_kind`` and ``kappa``.
    """

    stage: Stage | None = None
    bank: PriorBank | None = None
    _strength: float | None = None
    _continues = False

    def training_prior(self, batch: Mapping[str, Any]) -> Tensor | None:
        """pi ``(B, K, *)`` for a training batch; ``None`` where the network's own prior will do."""
        return None if self.bank is None else self.bank(batch["data"], batch.get("keys", ()))

    # ------------------------------------------------------------------ finding the prior
    def initialize(self) -> None:
        """Find the prior before anything is built; its weights go into the network."""
        if not self.was_initialized and self.settings.guided:
            self._find_prior()
        super().initialize()
        if self.settings.kappa is not None:
            self.module.kappa.fill_(self.settings.kappa)
        if self.stage is not None:
            load_prior(self.module.prior, self.stage)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Restore a training; the checkpoint brings its prior along, whatever has become of the prior's folder."""
        self._continues = True
        super().load_checkpoint(filename_or_checkpoint)

    def _find_prior(self) -> None:
        blocks = self._recorded_blocks() if self._continues else None
        trainer = None if blocks is None else blocks[self.base_name]["prior_trainer"]
        try:
            stage = self._fitting_stage()
        except (StageError, CheckpointError):
            if trainer is None:
                raise
        else:
            if trainer in (None, stage.trainer_name):
                self.stage, trainer = stage, stage.trainer_name
                blocks = stage.plans.get(PLANS_KEY, {}) if blocks is None else blocks
                self.print_to_log_file(f"Prior: {stage.folder}, fold {stage.fold}.")
        own = self.plans_manager.plans[PLANS_KEY]
        shared = (self.base_name, LABELS_KEY, PLANNER_KEY)
        own.update({k: v for k, v in blocks.items() if k not in shared})  # the prior may be one of our own methods
        own[self.base_name]["prior_trainer"] = trainer
        self.settings = replace(self.settings, prior_trainer=trainer)

    def _fitting_stage(self) -> Stage:
        plans = self.plans_manager.plans
        names = [self.plans_manager.plans_name]
        base = plans[PLANS_KEY].get(PLANNER_KEY, {}).get("base_plans")
        names += [base] if base and base not in names else []
        where = (plans["dataset_name"], self.configuration_name, self.settings.prior_trainer, names, self.fold)
        stage = load_stage(find_model_folder("prior", *where), self.fold)
        check_fits(stage, plans, self.configuration_name, self.dataset_json)
        if stage.trainer_name.split("_")[0] == self.base_name:
            raise StageError(f"{stage.folder} was trained by {self.base_name} itself, which cannot be its own prior.")
        return stage

    def _recorded_blocks(self) -> dict[str, Any] | None:
        """Settings in the model folder of the training that is continued or validated."""
        plans = Path(self.output_folder_base) / "plans.json"
        return json.loads(plans.read_text()).get(PLANS_KEY) if plans.is_file() else None

    # ------------------------------------------------------------------ priors of the training cases
    def on_train_start(self) -> None:
        """nnU-Net's, then the priors of the training cases and the scale of their residuals."""
        super().on_train_start()
        if self.module.prior is None:
            return
        fresh = self.current_epoch == 0
        if fresh and self.stage is not None:
            load_prior(self.module.prior, self.stage)  # -pretrained_weights has just overwritten a part of it
        self.bank = self._prior_bank()
        if fresh or (self.bank.kind == "corrupted" and self._strength is None):
            self._measure(set_scale=fresh)

    def _prior_bank(self) -> PriorBank:
        kind = self.settings.prior_kind
        fold_of: dict[str, int] = {}
        if kind in ("auto", "oof") and self.fold != "all" and self.stage is not None:
            folder, base = self.stage.folder, self.preprocessed_dataset_folder_base
            train, _ = self.do_split()
            folds = [k for k in range(number_of_folds(base)) if (folder / f"fold_{k}" / FINAL).is_file()]
            fold_of = out_of_fold(train, {k: load_split(base, k) for k in folds if k != self.fold})
            missing = [case for case in train if case not in fold_of]
            if missing and kind == "oof":
                raise StageError(
                    f"Token 'oof': {len(missing)} training cases, among them {missing[0]}, are in the training split "
                    f"of every prior in {folder} (folds {folds}). Train the prior on the other folds, or leave the "
                    "token out."
                )
            fold_of = {} if missing else fold_of
        if fold_of:
            networks = {k: self._load_fold(self.stage.folder, k) for k in sorted(set(fold_of.values()))}
            self.print_to_log_file(f"Training around out-of-fold priors (folds {sorted(networks)}).")
            return PriorBank(self.module, "oof", networks, fold_of)
        if kind == "oof":
            self.print_to_log_file("WARNING: no out-of-fold priors; training around the own one, corrupted.")
        kind = "corrupted" if kind in ("auto", "oof") else kind
        return PriorBank(self.module, kind, strength=self._strength or 0.0)

    def _load_fold(self, folder: Path, fold: int) -> nn.Module:
        arguments = (self.plans_manager, self.configuration_manager, self.num_input_channels)
        network = build_prior(self.settings.prior_trainer, *arguments, self.label_manager.num_segmentation_heads)
        load_prior(network, load_stage(folder, fold))
        return network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def _measure(self, set_scale: bool) -> None:
        """Strength of the corruption, kappa, and whether the prior errs in training as it does in validation."""
        train, val = (ErrorSample(self.module.as_prior, self.label_space.regions) for _ in range(2))
        for sample, loader in ((train, self.dataloader_train), (val, self.dataloader_val)):
            for _ in range(MEASURED_BATCHES):
                batch = self.on_device(next(loader))
                clean, valid = self.label_space.encode(batch["target"])
                with self.autocast():
                    data = batch["data"]
                    logits = self.bank.logits(data, batch["keys"]) if sample is train else self.module.prior(data)
                sample.add(logits, clean, valid)
        unseen = val.error().band
        known = self.fold != "all" and not math.isnan(unseen)
        strength = 0.0
        if self.bank.kind == "corrupted":
            (strength,) = self._of_rank_0(train.strength_for(unseen) if known else BLIND_STRENGTH)
            self._strength = self.bank.strength = strength
        error = PriorError(*self._of_rank_0(*train.error(strength)))
        if set_scale and not math.isnan(error.kappa):
            self.module.kappa.fill_(self.settings.kappa or min(1.0, max(0.02, error.kappa)))
            self.module.spread.fill_(max(1e-2, error.everywhere) / float(self.module.kappa))
        self.print_to_log_file(
            f"Prior ({self.bank.kind}, corrupted by {strength:.3f}): mean |y - pi| near the foreground "
            f"{error.band:.4f} in training, {unseen:.4f} in validation; kappa {float(self.module.kappa):.3f}."
        )
        factor = error.band / max(unseen, 1e-6)
        if known and not 1 / TRUSTED <= factor <= TRUSTED:
            self.print_to_log_file(
                f"WARNING: the prior errs {factor:.2f} times as much on training as on validation images, so the "
                "training will misjudge how far to trust it. Use out-of-fold priors: train the prior on all folds."
            )

    def _of_rank_0(self, *values: float) -> list[float]:
        """The ranks measure on different patches, and have to agree."""
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.is_ddp:
            dist.broadcast(shared, 0)
        return shared.tolist()

    # ------------------------------------------------------------------ checkpoints
    def extra_checkpoint(self) -> dict[str, Any]:
        """Also the strength of the corruption."""
        return {**super().extra_checkpoint(), "diffext_prior_strength": self._strength}

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Also the strength of the corruption."""
        super().restore_extra(checkpoint)
        self._strength = checkpoint.get("diffext_prior_strength")
