"""M4oE (Jiang and Shen 2024): modality experts in a Swin U-Net, as an nnU-Net trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.utils import clip_grad_norm_

from nnunet_diffext.evaluation.expert_usage import ExpertUsage
from nnunet_diffext.losses.balance import balance_loss
from nnunet_diffext.losses.segmentation import dice_ce_loss, merge_unannotated, without_unannotated
from nnunet_diffext.networks.blocks.experts import WEIGHING
from nnunet_diffext.networks.m4oe import M4oENet, M4oEOutput
from nnunet_diffext.networks.m4oe_transfer import freeze_all_but, start_from_pretraining
from nnunet_diffext.settings import PLANS_KEY
from nnunet_diffext.stages import Stage, StageError
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.base import MAX_NORM
from nnunet_diffext.trainers.configured import ConfiguredTrainer, instead
from nnunet_diffext.trainers.m4oe_settings import M4oESettings
from nnunet_diffext.trainers.multimodal import MultimodalTrainer
from nnunet_diffext.trainers.staged import StagedTrainer, load_weights

GATE_NORM = 1
"""Limit of the norm of the modality gate's gradient: without normalisation, large steps of SGD would ruin it."""
ONE_MODALITY = "One modality: its experts are shared out by the gate alone, which nothing but the loss tells apart."
GROWN = (
    "Name a model of nnunet_diffext add_modality: export nnUNet_diffext_pretraining=MODEL_FOLDER; or leave out the "
    "token freezeOld."
)
NOTHING_TELLS = (
    "Nothing in this network learns to tell the modality. Give it to nnunet_diffext predict (--modality); otherwise, "
    "as in the final validation, every label is asked of all modalities that have it."
)


class M4oETrainer(MultimodalTrainer, AdamTrainer, StagedTrainer):
    """One network for several modalities: an expert and a head for each, and a gate that shares what they know."""

    Settings = M4oESettings
    base_name = "M4oETrainer"
    stage_name = "pretraining"
    without_stage = "Or leave phase 1 out: token noMAE."
    reference = (
        "Jiang, Y., Shen, Y. (2024). M4oE: A Foundation Model for Medical Multimodal Image Segmentation with Mixture "
        "of Experts. MICCAI 2024."
    )
    usage: ExpertUsage | None = None
    _starved: frozenset[int] = frozenset()

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`M4oENet` from the plans alone, the same in training and at prediction."""
        s, label_space, architecture = M4oETrainer.read_plans(plans_manager, configuration_manager)
        return M4oENet(
            architecture,
            configuration_manager.patch_size,
            num_input_channels,
            label_space,
            s.modalities or {"image": [True] * label_space.num_heads},
            experts=s.experts,
            where=s.where,
            gate=s.gate,
            top1=s.top1,
            tells=s.tells,
            shared_head=s.shared_head,
            **s.network_arguments(),
        )

    def initialize(self) -> None:
        """Say what the experts stand for."""
        fresh = not self.was_initialized
        super().initialize()
        if fresh:
            modalities = self.settings.modalities
            self.print_to_log_file("Modalities:", ", ".join(modalities), f"({self.module.experts} experts)")
            if len(modalities) == 1 and self.settings.where != "none" and self.settings.gate in WEIGHING:
                self.print_to_log_file(ONE_MODALITY)
            if len(modalities) > 1 and self.module.modality_gate is None:
                self.print_to_log_file(NOTHING_TELLS)

    # ------------------------------------------------------------------ phase 1, or a model of add_modality
    @property
    def builds_on_stage(self) -> bool:
        """Unless the settings leave phase 1 out."""
        return self.settings.pretrained

    @property
    def _wanted_trainer(self) -> str:
        """Without a name of its own, phase 1 of a network that fits."""
        wanted = super()._wanted_trainer
        if wanted != M4oESettings.pretraining_trainer:
            return wanted
        plain = ["plain"] if self.settings.where in ("decoder", "none") else []
        return "_".join([wanted, *plain, *self.settings.size_tokens()])

    def _fitting_stage(self) -> Stage:
        if self.settings.freeze_old and not os.environ.get(f"nnUNet_diffext_{self.stage_name}"):
            raise StageError(f"freezeOld trains the newest modality of a grown model; which one? {GROWN}")
        return super()._fitting_stage()

    def check_stage(self, stage: Stage) -> None:
        """Phase 1 of the same modalities, or a model that ``add_modality`` has extended."""
        trainer = stage.trainer_name.split("_")[0]
        theirs = stage.plans.get(PLANS_KEY, {}).get(trainer, {}).get("modalities")
        if theirs is None:
            raise StageError(
                f"{stage.folder} was trained by {stage.trainer_name}, which is no pre-training of M4oE. "
                "Use one of M4oEPretrainTrainer, or leave it out: token noMAE."
            )
        if list(theirs) != list(self.settings.modalities):
            raise StageError(
                f"{stage.folder} knows the modalities {', '.join(theirs)}; this training is on "
                f"{', '.join(self.settings.modalities)}. Repeat the pre-training on this dataset, extend a trained "
                "model with nnunet_diffext add_modality, or leave it out: token noMAE."
            )
        if self.settings.freeze_old and not _brings_a_modality(stage):
            raise StageError(
                f"{stage.folder} has no modality that is newer than the others; freezeOld would train next to nothing, "
                f"or what an old one uses. {GROWN}"
            )

    def load_stage_weights(self) -> None:
        """The encoder of phase 1; all of a model that ``add_modality`` has extended."""
        if self.stage is None:
            return
        if self.stage.trainer_name.split("_")[0] == self.base_name:
            load_weights(self.module, self.stage)
            self.module.active |= self.module.since == self.module.since.max()  # until now, it could not be used
            self.print_to_log_file("The whole network starts from it.")
            return
        try:
            report = start_from_pretraining(self.module, self.stage.weights)
        except ValueError as error:
            raise StageError(f"{self.stage.folder}: {error}") from error
        self.print_to_log_file(report)

    def on_train_start(self) -> None:
        """A modality that nothing has taught its expert and its head must not answer."""
        super().on_train_start()
        taught = {self.cases.modality(case) for case in self.do_split()[0]}
        active, since = self.module.active, self.module.since
        for m, name in enumerate(self.settings.modalities):
            is_new = bool(since[m] == since.max())  # what is older was taught before, if it is active
            if is_new or not (active[m] or self.settings.freeze_old):
                active[m] = name in taught
            if not active[m]:
                self.print_to_log_file(
                    f"WARNING: nothing teaches {name}, of which fold {self.fold} has no training case: the model will "
                    "not predict that modality, and never takes an image for it. Another split, or fold all, may."
                    if name not in taught
                    else f"WARNING: {name} was never taught, and freezeOld does not: leave the token out."
                )

    # ------------------------------------------------------------------ optimisation
    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW, or nnU-Net's SGD."""
        if self.settings.freeze_old:
            freeze_all_but(self.network, len(self.settings.modalities) - 1)  # DDP wraps it later
        of = ConfiguredTrainer if self.settings.optimizer == "sgd" else AdamTrainer
        optimizer, _ = of.configure_optimizers(self)
        if self.settings.freeze_old:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0  # it would move what is frozen in part
        return optimizer, self.scheduler_of(optimizer)

    def clip_gradients(self) -> Tensor:
        """The modality gate's apart: how far it moves must not change how far the network does."""
        if self.module.modality_gate is None:
            return super().clip_gradients()
        own = list(self.module.modality_gate.parameters())
        ids = set(map(id, own))
        rest = [p for p in self.network.parameters() if id(p) not in ids]
        return torch.hypot(clip_grad_norm_(rest, MAX_NORM), clip_grad_norm_(own, GATE_NORM))

    def loss_weights(self) -> Mapping[str, float]:
        """Of the losses on the experts' gates, and of the gate that tells the modality."""
        return {"balance": self.settings.lambda_balance, "modality": self.settings.lambda_modality}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``sup``: 0.4 CE + 0.6 Dice on the sample's own classes; ``balance`` of the experts' gates; ``modality``: the
        cross-entropy of the gate that tells it."""
        s, image, keys = self.settings, batch["data"], batch.get("keys")
        modality = self.modality_of(keys, len(image))
        out: M4oEOutput = self.network(image, modality=modality)
        losses = {"sup": self.annotated_loss(out.logits, batch["target"], self.learned_heads(keys, modality))}
        gates = [*out.encoder_gates, *out.decoder_gates]
        if s.lambda_balance > 0 and gates:
            losses["balance"] = balance_loss(gates)
        if out.told is not None:
            # a modality that is not active has probability 0, which is no error of the gate
            known = self.module.active[modality]
            surprise = torch.where(known, nll_loss(out.told, modality, reduction="none"), 0.0)
            losses["modality"] = surprise.sum() / known.sum().clamp_min(1)
        if self.usage is not None:
            self.usage.add(out.encoder_gates, out.decoder_gates, modality, out.told)
        return losses

    def annotated_loss(self, logits: Tensor, target: Tensor, possible: Tensor) -> Tensor:
        """0.4 CE + 0.6 Dice against an nnU-Net target. Voxels of labels that cannot be there according to
        ``dataset.json`` do not count.

        Args:
            possible: bool ``(B, K)``, heads that every sample is compared on.
        """
        s, space = self.settings, self.label_space
        clean, valid = space.encode(target)
        clean = clean * possible.view(*possible.shape, *(1,) * (clean.ndim - 2))
        if not space.regions:
            valid = valid & (clean.sum(1, keepdim=True) > 0)
        return dice_ce_loss(
            logits, clean, valid,
            regions=space.regions, batch_dice=self.configuration_manager.batch_dice,
            dice_weight=s.lambda_dice, ce_weight=s.lambda_ce, annotated=possible,
        )  # fmt: skip

    def learned_heads(self, keys: list[str] | None, modality: Tensor) -> Tensor:
        """Heads that the samples teach ``(B, K)``: those that are annotated, or all that their modality has."""
        if self.settings.mask_unannotated:
            return self.annotated_in(keys, len(modality))
        return torch.tensor(list(self.settings.modalities.values()), device=self.device)[modality]

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, with the modality known, and without counting labels that nobody looked for."""
        keys, regions = batch["keys"], self.label_space.regions
        modality = self.modality_of(keys, len(batch["data"]))
        annotated = self.annotated_in(keys, len(modality))
        target, hidden = without_unannotated(batch["target"].to(self.device), annotated, regions=regions)
        network = self.network

        def known(image: Tensor) -> Tensor:
            return merge_unannotated(network(image, modality=modality), annotated, regions=regions, hidden=hidden)

        with instead(self, network=known, loss=partial(self.annotated_loss, possible=annotated)):
            return super().validation_step({**batch, "target": target})

    # ------------------------------------------------------------------ what the gates do
    def on_train_epoch_start(self) -> None:
        """Count anew."""
        super().on_train_epoch_start()
        inactive = (~self.module.active).nonzero().flatten().tolist()
        self.usage = ExpertUsage(self.module.modalities, self.module.experts, inactive)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Also which experts were used, per layer and modality."""
        super().on_train_epoch_end(train_outputs)
        if self.local_rank > 0:
            return
        if not math.isnan(self.usage.told):
            self._log("modality_told", self.usage.told)
        if self.usage.empty:
            return
        for expert, line in self.usage.starved():
            if expert not in self._starved:
                self.print_to_log_file(f"WARNING: {line}")
                self._starved |= {expert}
        self.usage.save(self.output_folder, self.current_epoch)


def _brings_a_modality(stage: Stage) -> bool:
    """Whether the last modality came later than all others, by :attr:`M4oENet.since`; not so in phase 1."""
    since = stage.weights.get("since")
    if since is None:
        return False
    count = len(stage.plans[PLANS_KEY][M4oETrainer.base_name]["modalities"])
    *others, last = [*since[count:].tolist(), *since[:count].tolist()]
    return last > max(others, default=last)
