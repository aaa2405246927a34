"""Settings of :class:`~nnunet_diffext.trainers.m4oe.M4oETrainer`, and its ablations by name."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_diffext.networks.blocks.experts import GATES, WEIGHING
from nnunet_diffext.networks.m4oe import WHERE
from nnunet_diffext.settings import SettingsError, setting
from nnunet_diffext.trainers.multimodal import SwinSettings


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
            "the optimiser of Swin-UNet and of the authors' code: SGD 0.05, momentum 0.9, weight decay 1e-4",
            {
                "optimizer": "sgd", "initial_lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "warmup": 0,
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
        None,
        "experts per block; none: one per modality, or 3 under a gate if there is a single one",
        number="experts#",
        minimum=1,
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
    shared_head: bool = setting(
        False, "one projection for all labels, of which a modality uses its own; or one per modality (paper)",
        switches={"unionHead": True},
    )  # fmt: skip
    drop_path: float = setting(0.2, "stochastic depth of the deepest block", number="droppath#", minimum=0, maximum=0.9)
    lambda_ce: float = setting(0.4, "weight of the cross-entropy", number="ce#", minimum=0)
    lambda_dice: float = setting(0.6, "weight of the Dice loss", number="dice#", minimum=0)
    lambda_balance: float = setting(0.0, "weight of the load balancing loss, per layer", number="balance#", minimum=0)
    lambda_modality: float = setting(
        1.0, "weight of the loss of the gate that tells the modality, with several of them; 0: there is no such gate",
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
        if self.top1 and self.gate not in WEIGHING:
            raise SettingsError("'top1' needs a gate over experts: leave out 'noGN' or 'officialGate'.")
        if self.where == "none" and (self.experts is not None or self.lambda_balance > 0 or self.gate != "token"):
            raise SettingsError("'woMoE' has no experts: leave out 'experts#', 'balance#' and tokens for the gate.")
        if self.freeze_old and not self.pretrained:
            raise SettingsError("'freezeOld' trains on from a model of nnunet_diffext add_modality: leave out 'noMAE'.")

    @property
    def tells(self) -> bool:
        """Whether the network has a gate that tells the modality, if there are several."""
        return self.lambda_modality > 0
