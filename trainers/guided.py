"""Trainings around the frozen network of an earlier one: finding it, and priors that err as they will on new images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunet_diffext.data.prior_errors import ErrorSample, PriorError
from nnunet_diffext.data.splits import load_split, number_of_folds
from nnunet_diffext.stages import FINAL, StageError, load_stage
from nnunet_diffext.trainers.priors import BLIND_STRENGTH, TRUSTED, PriorBank, out_of_fold
from nnunet_diffext.trainers.staged import StagedTrainer, build_network_of, load_weights

PRIOR_KINDS = ("auto", "oof", "corrupted", "insample")
MEASURED_BATCHES = 8


class GuidedTrainer(StagedTrainer):
    """Adds ``self.module.prior``, found by name or through ``nnUNet_diffext_prior``, and :meth:`training_prior`.

    The settings of a subclass hold ``guided``, ``prior_trainer``, ``prior_kind`` and ``kappa``.
    """

    stage_name = "prior"
    bank: PriorBank | None = None
    _strength: float | None = None
    _began_with: str | None = None

    def training_prior(self, batch: Mapping[str, Any]) -> Tensor | None:
        """pi ``(B, K, *)`` for a training batch; ``None`` where the network's own prior will do."""
        return None if self.bank is None else self.bank(batch["data"], batch.get("keys", ()))

    # ------------------------------------------------------------------ the prior of this fold
    @property
    def builds_on_stage(self) -> bool:
        """Unless the settings leave the prior out."""
        return self.settings.guided

    def initialize(self) -> None:
        """Find the prior before anything is built; its weights go into the network."""
        super().initialize()
        if self.settings.kappa is not None:
            self.module.kappa.fill_(self.settings.kappa)

    # ------------------------------------------------------------------ priors of the training cases
    def on_train_start(self) -> None:
        """nnU-Net's, then the priors of the training cases and the scale of their residuals."""
        super().on_train_start()
        if self.module.prior is None:
            return
        fresh = self.current_epoch == 0
        if fresh:
            self.load_stage_weights()  # -pretrained_weights has just overwritten a part of them
        self.bank = self._prior_bank()
        if fresh or (self.bank.kind == "corrupted" and self._strength is None):
            self._measure(set_scale=fresh)

    def _prior_bank(self) -> PriorBank:
        kind = self._began_with or self.settings.prior_kind
        fold_of: dict[str, int] = {}
        if kind in ("auto", "oof") and self.fold != "all" and self.stage is not None:
            folder, base = self.stage.folder, self.preprocessed_dataset_folder_base
            train, _ = self.do_split()
            folds = [k for k in range(number_of_folds(base)) if (folder / f"fold_{k}" / FINAL).is_file()]
            fold_of = out_of_fold(train, {k: load_split(base, k) for k in folds if k != self.fold})
            missing = [case for case in train if case not in fold_of]
            if missing and kind == "oof" and self._began_with is None:
                raise StageError(
                    f"Token 'oof': {len(missing)} training cases, among them {missing[0]}, are in the training split "
                    f"of every prior in {folder} (folds {folds}). Train the prior on the other folds, or leave the "
                    "token out."
                )
            fold_of = {} if missing else fold_of
        if self._began_with == "oof" and not fold_of:
            raise StageError(
                "This training began around out-of-fold priors, which are not found any more. Put the folds of the "
                f"prior back, or let nnUNet_diffext_{self.stage_name} name their model folder."
            )
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
        network = build_network_of(self.settings.prior_trainer, *arguments, self.label_manager.num_segmentation_heads)
        load_weights(network, load_stage(folder, fold))
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
        """Also of which kind the priors of the training cases are, and how strongly they are corrupted."""
        kind = self._began_with if self.bank is None else self.bank.kind
        return {
            **super().extra_checkpoint(), "diffext_prior_strength": self._strength, "diffext_prior_kind": kind
        }  # fmt: skip

    def restore_extra(self, checkpoint: Mapping[str, Any]) -> None:
        """Also kind and corruption of the priors."""
        super().restore_extra(checkpoint)
        self._strength = checkpoint.get("diffext_prior_strength")
        self._began_with = checkpoint.get("diffext_prior_kind")
