"""M4oE (Jiang and Shen 2024): modality experts in a Swin U-Net, as an nnU-Net trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.evaluation.expert_usage import ExpertUsage
from nnunet_diffext.losses.balance import balance_loss, modality_loss
from nnunet_diffext.losses.segmentation import dice_ce_loss, merge_unannotated, without_unannotated
from nnunet_diffext.networks.blocks.experts import GATES
from nnunet_diffext.networks.m4oe import WHERE, M4oENet, M4oEOutput
from nnunet_diffext.networks.m4oe_transfer import freeze_all_but, start_from_pretraining
from nnunet_diffext.settings import PLANS_KEY, SettingsError, setting
from nnunet_diffext.stages import Stage, StageError
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.configured import ConfiguredTrainer, instead
from nnunet_diffext.trainers.multimodal import MultimodalTrainer, SwinSettings
from nnunet_diffext.trainers.staged import StagedTrainer, load_weights

ONE_MODALITY = "One modality: its experts are shared out by the gate alone, which nothing but the loss tells apart."


@dataclass(frozen=True, kw_only=True)
class M4oESettings(SwinSettings):
    """Settings of :class:`M4oETrainer`. "Paper" is Jiang and Shen, MICCAI 2024; Table 4 its ablations."""

    presets = {
        "woMoE": ("plain MLPs everywhere (Table 4)", {"where": "none"}),
        "noGN": ("without gate: a sample goes to the expert of its modality (Table 4)", {"gate": "none"}),
        "paper": (
            "the paper's network (noStem) and optimiser: AdamW, weight decay 1e-4, only 0.4 CE + 0.6 Dice",
            {"stem": False, "weight_decay": 1e-4, "lambda_modality": 0.0},
        ),
        "swinUNet": (
            "only the optimiser of Swin-UNet and of the authors' code: SGD 0.05, momentum 0.9, weight decay 1e-4",
            {
                "optimizer": "sgd", "initial_lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "warmup": 0,
                "lambda_modality": 0.0,
            },
        ),
    }  # fmt: skip

    initial_lr: float = setting(5e-4, "initial learning rate, decayed with power 0.9", number="lr#", minimum=0)
    weight_decay: float = setting(1e-2, "weight decay", number="wd#", minimum=0)
    optimizer: str = setting("adamw", "AdamW (paper) or SGD (the authors' code)", choices=("adamw", "sgd"))
    pretraining_trainer: str = setting(
        "M4oEPretrainTrainer", "trainer of phase 1; nnUNet_diffext_pretraining names a model folder instead"
    )
    pretrained: bool = setting(True, "start from phase 1, the masked autoencoder", switches={"noMAE": False})
    experts: int | None = setting(
        None, "experts per block; none: one per modality, or 3 if there is a single one", number="experts#", minimum=1
    )
    where: str = setting(
        "both", "which half has experts (Table 4)", choices=WHERE,
        switches={"encoderOnly": "encoder", "decoderOnly": "decoder"},
    )  # fmt: skip
    gate: str = setting(
        "token", "weights of the experts: per token (eq. 2), per sample, per channel as in the authors' code, or none",
        choices=GATES, switches={"sampleGate": "sample", "officialGate": "channel"},
    )  # fmt: skip
    top1: bool = setting(False, "only the most probable expert contributes", switches={"top1": True})
    drop_path: float = setting(0.2, "stochastic depth of the deepest block", number="droppath#", minimum=0, maximum=0.9)
    lambda_ce: float = setting(0.4, "weight of the cross-entropy", number="ce#", minimum=0)
    lambda_dice: float = setting(0.6, "weight of the Dice loss", number="dice#", minimum=0)
    lambda_balance: float = setting(0.0, "weight of the load balancing loss, per layer", number="balance#", minimum=0)
    lambda_modality: float = setting(
        0.1, "weight of the loss that makes the encoder's gate tell the modality, with several of them",
        number="modality#", minimum=0,
    )  # fmt: skip
    mask_unannotated: bool = setting(
        True, "labels that nobody looked for in a case may be anywhere in its background; or they are background, as "
        "in stock nnU-Net",
        switches={"asBackground": False},
    )  # fmt: skip
    freeze_old: bool = setting(
        False, "after add_modality: train nothing but what the new modality brought", switches={"freezeOld": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top1 and self.gate not in ("token", "sample"):
            raise SettingsError("'top1' needs a gate over experts: leave out 'noGN' or 'officialGate'.")
        if self.where == "none" and (self.experts is not None or self.lambda_balance > 0 or self.gate != "token"):
            raise SettingsError("'woMoE' has no experts: leave out 'experts#', 'balance#' and tokens for the gate.")
        if self.freeze_old and not self.pretrained:
            raise SettingsError("'freezeOld' trains on from a model of nnunet_diffext add_modality: leave out 'noMAE'.")

    @property
    def tells(self) -> bool:
        """Whether the encoder has gates over experts."""
        return self.gate in ("token", "sample") and self.where in ("both", "encoder")


class M4oETrainer(MultimodalTrainer, AdamTrainer, StagedTrainer):
    """One network for several modalities: an expert and a head for each, and a gate that shares what they know."""

    Settings = M4oESettings
    base_name = "M4oETrainer"
    stage_name = "pretraining"
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
            **s.network_arguments(),
        )

    def initialize(self) -> None:
        """Say what the experts stand for."""
        fresh = not self.was_initialized
        super().initialize()
        if fresh:
            modalities = self.settings.modalities
            self.print_to_log_file("Modalities:", ", ".join(modalities), f"({self.module.experts} experts)")
            if len(modalities) == 1 and self.module.experts > 1:
                self.print_to_log_file(ONE_MODALITY)

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
                "or what an old one uses. It is for a model of nnunet_diffext add_modality: export "
                f"nnUNet_diffext_{self.stage_name}=MODEL_FOLDER, or leave out the token freezeOld."
            )

    def load_stage_weights(self) -> None:
        """The encoder of phase 1; all of a model that ``add_modality`` has extended."""
        if self.stage is None:
            return
        if self.stage.trainer_name.split("_")[0] == self.base_name:
            load_weights(self.module, self.stage)
            self.module.active.fill_(True)  # until now, the new expert could not be used
            self.print_to_log_file("The whole network starts from it.")
            return
        try:
            report = start_from_pretraining(self.module, self.stage.weights)
        except ValueError as error:
            raise StageError(f"{self.stage.folder}: {error}") from error
        self.print_to_log_file(report)

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

    def loss_weights(self) -> Mapping[str, float]:
        """Of the losses on the gates."""
        return {"balance": self.settings.lambda_balance, "modality": self.settings.lambda_modality}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``sup``: 0.4 CE + 0.6 Dice on the sample's own classes; ``balance`` and ``modality`` of the gates."""
        s, image, keys = self.settings, batch["data"], batch.get("keys")
        modality = self.modality_of(keys, len(image))
        out: M4oEOutput = self.network(image, modality=modality)
        losses = {"sup": self.annotated_loss(out.logits, batch["target"], self.learned_heads(keys, modality))}
        gates = [*out.encoder_gates, *out.decoder_gates]
        if s.lambda_balance > 0 and gates:
            losses["balance"] = balance_loss(gates)
        if s.lambda_modality > 0 and out.encoder_gates and len(self.module.modalities) > 1:
            losses["modality"] = modality_loss(out.encoder_gates, modality, len(self.module.modalities))
        if self.usage is not None and gates:
            self.usage.add(out.encoder_gates, out.decoder_gates, modality)
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
        self.usage = ExpertUsage(self.module.modalities, self.module.experts)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Also which experts were used, per layer and modality."""
        super().on_train_epoch_end(train_outputs)
        if self.usage.empty or self.local_rank > 0:
            return
        self._log("modality_told", self.usage.told)
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
