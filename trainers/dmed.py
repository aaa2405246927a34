"""DMED-Seg (Xun and Ku 2026): two experts, a fusion that weighs them, and unlabelled images, as an nnU-Net trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.data.mixing import invert_half, paste, random_cuboid
from nnunet_diffext.losses.contrastive import inter_expert_alignment
from nnunet_diffext.losses.levels import over_levels
from nnunet_diffext.losses.schedules import gaussian_ramp
from nnunet_diffext.networks.dmed import EXPERTS, FUSIONS, DMEDNet, DMEDOutput
from nnunet_diffext.settings import MethodSettings, SettingsError, setting
from nnunet_diffext.trainers.semisupervised import SemiSupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class DMEDSettings(MethodSettings):
    """Settings of :class:`DMEDSegTrainer`. "Paper" is Xun and Ku 2026, doi:10.20944/preprints202601.0942.v1."""

    presets = {
        "CEonly": ("convolutional expert alone, with SSL (Table 2, row 1)", {"experts": "ce"}),
        "DEonly": ("diffusion expert alone, with SSL (Table 2, row 2)", {"experts": "de"}),
        "fixedAverage": (
            "average of the experts' predictions, no unlabelled loss (Table 2, row 3)",
            {"fusion": "average", "lambda_cac": 0.0},
        ),
        "iefaUncertain": (
            "feature alignment, most where the fused prediction is uncertain (section 3.6)",
            {"lambda_iefa": 0.5, "iefa_uncertain": True},
        ),
        "paper": (
            "the paper's recipe: pseudo-labels without perturbation or teacher, features fused, SGD 0.9, 300 epochs",
            {
                "copy_paste": 0.0, "strong_intensity": False, "ema_decay": 0.0, "momentum": 0.9, "epochs": 300,
                "ramp": 1.0, "fuse_predictions": False, "expert_supervision": 1.0, "coupled": True, "lambda_iefa": 0.5,
            },
        ),
    }  # fmt: skip

    experts: str = setting("both", "which experts are built", choices=EXPERTS)
    fusion: str = setting("transformer", "how the experts are fused (section 3.4)", choices=FUSIONS)
    fuse_predictions: bool = setting(
        True, "add the weighted expert logits to the read-out of the fused features", switches={"featuresOnly": False}
    )
    full_resolution_de: bool = setting(
        True, "diffusion expert at full resolution, or from the second stage on", switches={"halfDE": False}
    )
    lambda_cac: float = setting(
        1.0, "weight of confidence-aware consistency (eq. 5, Table 5)",
        number="cac#", switches={"noCACL": 0.0}, minimum=0,
    )  # fmt: skip
    lambda_iefa: float = setting(
        0.0, "weight of inter-expert feature alignment (eq. 5, Table 5); 0.5 in the paper, where it did harm here",
        number="iefa#", switches={"IEFA": 0.5}, minimum=0,
    )  # fmt: skip
    iefa_temperature: float = setting(0.1, "temperature of eq. 3", number="tau#", minimum=1e-3)
    iefa_uncertain: bool = setting(
        False, "weigh locations of eq. 3 by 1 - confidence ('particularly in uncertain regions')"
    )
    confidence_threshold: float | None = setting(
        None, "count only pseudo-labels of higher confidence, unweighted (section 3.5, alternative)",
        number="threshold#", minimum=0, maximum=1,
    )  # fmt: skip
    ramp: float = setting(
        0.25, "share of the training over which lambda_cac grows, exp(-5 (1 - t)^2)", number="ramp#", minimum=0
    )
    expert_supervision: float = setting(
        1.0, "weight of the losses on P_DE and P_CE, which eq. 4 leaves without gradient",
        number="expert#", switches={"eq4": 0.0}, minimum=0,
    )  # fmt: skip
    deep_supervision: bool = setting(
        False, "losses of the experts at coarser resolutions as well, as in nnU-Net", switches={"DS": True}
    )
    coupled: bool = setting(
        False, "the loss on the fused prediction trains the experts as well, or only the fusion; always with eq4",
        switches={"coupled": True},
    )  # fmt: skip
    diffusion_weight: float = setting(
        0.5, "weight of the diffusion loss on labelled images (x0-prediction at random t)",
        number="diffusion#", switches={"TOnly": 0.0}, minimum=0,
    )  # fmt: skip
    recycle: bool = setting(
        False, "diffusion pass on the expert's own prediction instead of the label", switches={"recycle": True}
    )
    leaky: bool = setting(
        False, "control: the fused path sees label-noised masks, so training leaks the label", switches={"leaky": True}
    )
    schedule: str = setting(
        "cosine", "noise schedule of the diffusion expert", choices=("cosine", "linear"), switches={"linear": "linear"}
    )
    target_scale: float = setting(0.1, "b: clean masks are b (2 y - 1)", number="bscale#", minimum=1e-3)
    copy_paste: float = setting(
        2 / 3, "edge of the cuboid exchanged between labelled and unlabelled patches, relative to the patch",
        number="copyPaste#", switches={"noCopyPaste": 0.0}, minimum=0, maximum=1,
    )  # fmt: skip
    mix_share: float = setting(
        1.0, "copy-paste: share of the steps that mix; in the others, images stay whole, as they are at prediction",
        number="mix#", minimum=0, maximum=1,
    )  # fmt: skip
    both_directions: bool = setting(
        True, "copy-paste: train on both images of an exchange, twice the batch, or on one of them per pair",
        switches={"oneDirection": False},
    )  # fmt: skip
    strong_intensity: bool = setting(
        True, "the student sees unlabelled patches with nnU-Net's intensity augmentation, the teacher without",
        switches={"noStrong": False},
    )  # fmt: skip
    ema_decay: float = setting(
        0.99, "decay of the exponential moving average of the weights (teacher); 0: none",
        number="ema#", switches={"noEMA": 0.0}, minimum=0, maximum=1,
    )  # fmt: skip
    labeled_percent: float | None = setting(
        None, "labels of this share of the training cases only; the others are unlabelled (section 4.6)",
        number="#percent", minimum=0, maximum=100,
    )  # fmt: skip
    noise_seed: int = setting(0, "seed of the diffusion expert's noise at prediction", number="noise#", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts == "ce":
            switches = {"leaky": self.leaky, "recycle": self.recycle, "halfDE": not self.full_resolution_de}
            useless = ", ".join(name for name, on in switches.items() if on)
            if useless:
                raise SettingsError(f"{useless}: concerns the diffusion expert, which 'CEonly' leaves out.")
        if self.recycle and self.diffusion_weight == 0:
            raise SettingsError("'recycle' changes the diffusion pass, which 'TOnly' (diffusion_weight 0) leaves out.")


class DMEDSegTrainer(SemiSupervisedTrainer):
    """A diffusion and a convolutional expert, fused by a transformer; learns from unlabelled images as well."""

    Settings = DMEDSettings
    base_name = "DMEDSegTrainer"
    reference = (
        "Xun, Z., Ku, Y. (2026). Dynamic Multi-Expert Diffusion Segmentation for Semi-Supervised 3D Medical Image "
        "Segmentation. Preprints 202601.0942."
    )

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`DMEDNet` from the plans alone, the same in training and at prediction."""
        s, label_space, architecture = DMEDSegTrainer.read_plans(plans_manager, configuration_manager)
        return DMEDNet(
            architecture,
            num_input_channels,
            label_space,
            experts=s.experts,
            fusion=s.fusion,
            fuse_predictions=s.fuse_predictions,
            coupled=s.coupled or s.expert_supervision == 0,
            full_resolution_de=s.full_resolution_de,
            embedding_channels=128 if s.lambda_iefa > 0 else 0,
            schedule=s.schedule,
            target_scale=s.target_scale,
            noise_seed=s.noise_seed,
            deep_supervision=s.deep_supervision,
        )

    @property
    def uses_unlabeled(self) -> bool:
        """Only two losses do."""
        return self.settings.lambda_cac > 0 or self.settings.lambda_iefa > 0

    # ------------------------------------------------------------------ losses
    def loss_weights(self) -> Mapping[str, float]:
        """Eq. 5, with the ramp on the consistency terms and the terms that eq. 4 leaves out."""
        s = self.settings
        cac = s.lambda_cac * gaussian_ramp(self.progress, s.ramp)
        return {
            "sup_experts": s.expert_supervision,
            "diffusion": s.diffusion_weight,
            "cac": cac,
            "cac_experts": cac * s.expert_supervision,
            "iefa": s.lambda_iefa,
        }

    @property
    def mixes(self) -> bool:
        """Whether labelled and unlabelled images are pasted into each other. Without pseudo-labels, nothing is."""
        return self.settings.copy_paste > 0 and self.settings.lambda_cac > 0

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``sup`` (eq. 4), ``cac`` (eq. 2), ``iefa`` (eq. 3), their counterparts on the experts, and ``diffusion``.

        Labels and pseudo-labels share one target map; a voxel counts in ``sup`` or in ``cac``.
        """
        s = self.settings
        labeled_image = batch["data"]
        clean, valid = self.label_space.encode(batch["target"])
        valid = valid.to(clean.dtype)
        image, target, labeled, pseudo = labeled_image, clean, valid, None
        mixes = "unlabeled" in batch and self.mixes and (s.mix_share == 1 or float(torch.rand(())) < s.mix_share)
        if "unlabeled" in batch:
            image, target, labeled, pseudo = self.with_unlabeled(labeled_image, clean, valid, batch["unlabeled"], mixes)

        diffusion = {}
        if s.diffusion_weight > 0:
            # half of the batch, as in the paper; drawn, because nnU-Net puts samples with forced foreground last
            chosen = torch.randperm(len(labeled_image))[: (len(labeled_image) + 1) // 2]
            diffusion = {"clean": clean[chosen], "clean_image": labeled_image[chosen], "recycle": s.recycle}
        out: DMEDOutput = self.network(image, leaky=target if s.leaky else None, **diffusion)

        # a mixed patch holds pieces of two images, often without foreground: their Dice means little one by one
        pool = mixes
        losses = {"sup": self.prediction_loss(out, target, labeled, pool)}
        losses["sup_experts"] = self.expert_losses(out, target, labeled, pool)
        if pseudo is not None and s.lambda_cac > 0:
            losses["cac"] = self.prediction_loss(out, target, pseudo, pool)
            losses["cac_experts"] = self.expert_losses(out, target, pseudo, pool)
        if out.embeddings is not None:
            weight = self.uncertainty_at(out) if s.iefa_uncertain else None
            losses["iefa"] = inter_expert_alignment(*out.embeddings, temperature=s.iefa_temperature, weight=weight)
        if out.denoised is not None:
            losses["diffusion"] = self.segmentation_loss(out.denoised, clean[chosen], valid[chosen])
        return losses

    def prediction_loss(self, out: DMEDOutput, target: Tensor, weight: Tensor, pool: bool) -> Tensor:
        """``L_seg`` of the fused prediction; a single expert's is deeply supervised."""
        both = out.de is not None and out.ce is not None
        return self.deep_loss([out.fused] if both else out.de_levels or out.ce_levels, target, weight, pool)

    def expert_losses(self, out: DMEDOutput, target: Tensor, weight: Tensor, pool: bool) -> Tensor:
        """Sum of ``L_seg`` over both experts' own predictions; 0 for a single one, which is the fused one."""
        if out.de is None or out.ce is None:
            return out.fused.new_zeros(())
        return sum(self.deep_loss(levels, target, weight, pool) for levels in (out.de_levels, out.ce_levels))

    def deep_loss(self, levels: list[Tensor], target: Tensor, weight: Tensor, pool: bool) -> Tensor:
        """``L_seg`` over the resolutions of one prediction."""
        return over_levels(partial(self.segmentation_loss, pool=pool), levels, target, weight)

    def with_unlabeled(
        self, image: Tensor, clean: Tensor, valid: Tensor, unlabeled: Tensor, mixes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student images, targets, and the weights of labelled and pseudo-labelled voxels.

        If it ``mixes``, ``2 B`` samples in which a cuboid of one image lies in the other (``B`` for one direction per
        pair); without, the ``B`` labelled images followed by the ``B`` unlabelled ones.
        """
        s = self.settings
        weak, strong = self.views(unlabeled)
        student = strong if s.strong_intensity else weak
        nothing = torch.zeros_like(valid)
        pseudo_onehot, confidence = self.pseudo_labels(weak) if s.lambda_cac > 0 else (torch.zeros_like(clean), nothing)
        pairs = (
            (image, student), (clean, pseudo_onehot.to(clean.dtype)),
            (valid, nothing), (nothing, confidence.to(valid.dtype)),
        )  # fmt: skip
        if not mixes:
            return tuple(torch.cat(pair) for pair in pairs)
        mask = random_cuboid(len(image), image.shape[2:], s.copy_paste, image.device)
        if s.both_directions:
            return tuple(torch.cat([paste(a, b, mask), paste(b, a, mask)]) for a, b in pairs)
        mask = invert_half(mask)
        return tuple(paste(a, b, mask) for a, b in pairs)

    @torch.no_grad()
    def pseudo_labels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Pseudo-labels ``argmax P_DFM`` ``(B, K, *)`` and confidence ``1 - H / log K`` ``(B, 1, *)``, section 3.5.

        With a threshold, confidence is 1 above and 0 below it.
        """
        s = self.settings
        if s.ema_decay > 0:
            logits = (self.teacher or self.start_teacher())(image)
        else:
            self.module.eval()
            logits = self.module(image)
            self.module.train()
            torch.clear_autocast_cache()  # before PyTorch 2.10, casts made here would hide gradients later (#112583)
        probabilities = self.label_space.probabilities(logits)
        confidence = self.label_space.confidence(probabilities)
        if s.confidence_threshold is not None:
            confidence = (confidence > s.confidence_threshold).to(confidence.dtype)
        return self.label_space.harden(probabilities), confidence

    @torch.no_grad()
    def uncertainty_at(self, out: DMEDOutput) -> Tensor:
        """``1 - confidence`` of the fused prediction, ``(B, 1, *)``, pooled to the grid of the embeddings."""
        entropy = self.label_space.normalized_entropy(self.label_space.probabilities(out.fused))
        pool = nn.functional.adaptive_avg_pool3d if entropy.ndim == 5 else nn.functional.adaptive_avg_pool2d
        return pool(entropy, out.embeddings[0].shape[2:])
