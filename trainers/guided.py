"""Trainings around the frozen network of an earlier one: finding it, and priors that err as they will on new images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.data.splits import load_split, number_of_folds
from nnunet_diffext.settings import PLANNER_KEY, PLANS_KEY
from nnunet_diffext.stages import FINAL, Stage, StageError, check_fits, find_model_folder, load_stage
from nnunet_diffext.trainers.base import DiffextTrainer
from nnunet_diffext.trainers.priors import BLIND_STRENGTH, TRUSTED, ErrorSample, PriorBank, build_prior, out_of_fold

PRIOR_KINDS = ("auto", "oof", "corrupted", "insample")
MEASURED_BATCHES = 8
__all__ = ["PRIOR_KINDS", "GuidedTrainer", "build_prior"]


class GuidedTrainer(DiffextTrainer):
    """Adds ``self.module.prior``, found by name or through ``nnUNet_diffext_prior``, and :meth:`training_prior`.

    The settings of a subclass hold ``guided``, ``prior_trainer``, ``prior_kind`` and ``kappa``.
    """

    stage: Stage | None = None
    bank: PriorBank | None = None
    _strength: float | None = None

    def training_prior(self, batch: Mapping[str, Any]) -> Tensor | None:
        """pi ``(B, K, *)`` for a training batch; ``None`` where the network's own prior will do."""
        return None if self.bank is None else self.bank(batch["data"], batch.get("keys", ()))

    def initialize(self) -> None:
        """Find the prior before anything is built; its weights go into the network."""
        if not self.was_initialized and self.settings.guided:
            self._find_prior()
        super().initialize()
        if self.stage is not None:
            try:
                self.module.prior.load_state_dict(self.stage.weights)
            except RuntimeError as error:
                raise StageError(
                    f"The weights of {self.stage.folder} do not fit the network that {self.stage.trainer_name} builds "
                    f"from these plans: {error}"
                ) from error

    def _find_prior(self) -> None:
        plans = self.plans_manager.plans
        names = [self.plans_manager.plans_name]
        base = plans[PLANS_KEY].get(PLANNER_KEY, {}).get("base_plans")
        names += [base] if base and base not in names else []
        where = (plans["dataset_name"], self.configuration_name, self.settings.prior_trainer, names, self.fold)
        try:
            self.stage = load_stage(find_model_folder("prior", *where), self.fold)
        except StageError:
            recorded = self._recorded_prior()
            if recorded is None:
                raise
            self._record_prior(recorded)  # the network brings its prior along: only out-of-fold priors are missed
            return
        check_fits(self.stage, plans, self.configuration_name, self.dataset_json)
        for name, block in self.stage.plans.get(PLANS_KEY, {}).items():
            plans[PLANS_KEY].setdefault(name, block)  # the prior may be one of our own methods
        self._record_prior(self.stage.trainer_name)
        self.print_to_log_file(f"Prior: {self.stage.folder}, fold {self.stage.fold}.")

    def _recorded_prior(self) -> str | None:
        """Trainer of the prior in the checkpoint that is being continued or validated."""
        plans = Path(self.output_folder_base) / "plans.json"
        if not plans.is_file() or not list(Path(self.output_folder).glob("checkpoint_*.pth")):
            return None
        return json.loads(plans.read_text()).get(PLANS_KEY, {}).get(self.base_name, {}).get("prior_trainer")

    def _record_prior(self, trainer_name: str) -> None:
        self.settings = replace(self.settings, prior_trainer=trainer_name)
        self.plans_manager.plans[PLANS_KEY][self.base_name]["prior_trainer"] = trainer_name

    def on_train_start(self) -> None:
        """nnU-Net's, then the priors of the training cases and the scale of their residuals."""
        super().on_train_start()
        if self.module.prior is None:
            self.bank = PriorBank(self.module)
            return
        self.bank = self._prior_bank()
        if self.current_epoch == 0:
            self._measure()

    def _prior_bank(self) -> PriorBank:
        kind = self.settings.prior_kind
        fold_of, folders = {}, {}
        if kind in ("auto", "oof") and self.fold != "all" and self.stage is not None:
            folder, base = self.stage.folder, self.preprocessed_dataset_folder_base
            folds = [k for k in range(number_of_folds(base)) if (folder / f"fold_{k}" / FINAL).is_file()]
            train, _ = self.do_split()
            fold_of = out_of_fold(train, {k: load_split(base, k) for k in folds if k != self.fold})
            missing = [case for case in train if case not in fold_of]
            if missing and kind == "oof":
                raise StageError(
                    f"Token 'oof': {len(missing)} training cases, among them {missing[0]}, are in the training split of "
                    f"every prior in {folder} (folds {folds}). Train the prior on the other folds, or leave the token "
                    "out."
                )
            fold_of = {} if missing else fold_of
            folders = {k: folder for k in set(fold_of.values())}
        if fold_of:
            networks = {k: self._load_prior(folder, k) for k, folder in folders.items()}
            self.print_to_log_file(f"Training around out-of-fold priors (folds {sorted(networks)}).")
            return PriorBank(self.module, "oof", networks, fold_of)
        kind = "corrupted" if kind in ("auto", "oof") else kind
        return PriorBank(self.module, kind, strength=self._strength or 0.0)

    def _load_prior(self, folder: Any, fold: int) -> nn.Module:
        arguments = (self.plans_manager, self.configuration_manager, self.num_input_channels)
        network = build_prior(self.settings.prior_trainer, *arguments, self.label_manager.num_segmentation_heads)
        network.load_state_dict(load_stage(folder, fold).weights)
        return network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def _measure(self) -> None:
        """kappa, and whether the prior errs in training as it does in validation (METHODS 6.5-3)."""
        samples = {}
        for name, loader in (("train", self.dataloader_train), ("val", self.dataloader_val)):
            samples[name] = ErrorSample(self.module)
            for _ in range(MEASURED_BATCHES):
                batch = self.on_device(next(loader))
                clean, valid = self.label_space.encode(batch["target"])
                keys = batch["keys"] if name == "train" else ()
                with self.autocast():
                    logits = self.bank.logits(batch["data"], keys)
                samples[name].add(logits, clean, valid)
        unseen = samples["val"].residuals()[0]
        known = self.fold != "all" and unseen == unseen
        if self.bank.kind == "corrupted":
            self._strength = samples["train"].strength_for(unseen) if known else BLIND_STRENGTH
            self.bank.strength = self._strength
        error, kappa, spread = samples["train"].residuals(self.bank.strength)
        if kappa == kappa:  # some batch had foreground
            self.module.kappa.fill_(self.settings.kappa or min(1.0, max(0.02, kappa)))
            self.module.spread.fill_(max(1e-2, spread) / float(self.module.kappa))
        self.print_to_log_file(
            f"Prior ({self.bank.kind}, corrupted by {self.bank.strength:.3f}): mean |y - pi| near the foreground "
            f"{error:.4f} in training, {unseen:.4f} in validation; kappa {float(self.module.kappa):.3f}."
        )
        if known and not 1 / TRUSTED <= error / max(unseen, 1e-6) <= TRUSTED:
            self.print_to_log_file(
                f"WARNING: the prior errs {error / max(unseen, 1e-6):.2f} times as much on training as on validation "
                "images, so the training will misjudge how far to trust it. Use out-of-fold priors: train the prior on "
                "all folds."
            )

    def extra_checkpoint(self) -> dict[str, Any]:
        """Also the strength of the corruption."""
        return {**super().extra_checkpoint(), "diffext_prior_strength": self._strength}

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Also the strength of the corruption."""
        super().restore_extra(checkpoint)
        self._strength = checkpoint.get("diffext_prior_strength")
