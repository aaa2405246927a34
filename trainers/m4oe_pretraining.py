"""Phase 1 of M4oE: a masked autoencoder of images of all modalities, as an ordinary nnU-Net training without labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunet_diffext.data.pool import UnlabeledPool
from nnunet_diffext.files import RECONSTRUCTION, write_atomically
from nnunet_diffext.losses.diffusion import masked_error
from nnunet_diffext.networks.masked_autoencoder import M4oEAutoencoder, ReconstructionOutput
from nnunet_diffext.settings import setting
from nnunet_diffext.trainers.adam import AdamTrainer
from nnunet_diffext.trainers.multimodal import MultimodalTrainer, SwinSettings
from nnunet_diffext.trainers.semisupervised import SemiSupervisedTrainer


@dataclass(frozen=True, kw_only=True)
class M4oEPretrainSettings(SwinSettings):
    """Settings of :class:`M4oEPretrainTrainer`; the paper has none, these are those of Swin-MAE (Dai et al. 2023)."""

    epochs: int = setting(400, "number of epochs", number="#epochs", minimum=1)
    initial_lr: float = setting(1e-3, "initial learning rate of AdamW, decayed with power 0.9", number="lr#", minimum=0)
    weight_decay: float = setting(0.05, "weight decay of AdamW", number="wd#", minimum=0)
    mask_ratio: float = setting(0.75, "share of the image that is hidden", number="mask#", minimum=0.01, maximum=0.99)
    mask_unit: int = setting(4, "patches per axis that are hidden together", number="unit#", minimum=1)
    where: str = setting(
        "both", "experts in the encoder, or plain MLPs for an M4oETrainer that has none there",
        choices=("both", "none"), switches={"plain": "none"},
    )  # fmt: skip
    drop_path: float = setting(0.0, "stochastic depth of the deepest block", number="droppath#", minimum=0, maximum=0.9)
    labeled_percent: float | None = setting(
        None, "count this share of the training cases as labelled; the images of all are used in any case",
        number="#percent", minimum=0, maximum=100,
    )  # fmt: skip


class M4oEPretrainTrainer(MultimodalTrainer, AdamTrainer, SemiSupervisedTrainer):
    """Reconstructs hidden parts of images; every modality trains its own experts, all of them the attention.

    Sees images only: those of the training split, and everything unlabelled, ``imagesTu/`` included.
    """

    Settings = M4oEPretrainSettings
    base_name = "M4oEPretrainTrainer"

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`M4oEAutoencoder` from the plans alone."""
        s, _, architecture = M4oEPretrainTrainer.read_plans(plans_manager, configuration_manager)
        return M4oEAutoencoder(
            architecture,
            configuration_manager.patch_size,
            num_input_channels,
            len(s.modalities or "1") if s.where == "both" else 0,
            mask_ratio=s.mask_ratio,
            mask_unit=s.mask_unit,
            **s.network_arguments(),
        )

    def initialize(self) -> None:
        """Not for the second stage of a cascade.

        Raises:
            NotImplementedError: for that.
        """
        if self.is_cascaded:
            raise NotImplementedError(
                f"{self.base_name} reconstructs images; the masks of {self.configuration_manager.previous_stage_name} "
                f"that {self.configuration_name} also sees are not made by it. Train {self.configuration_name} without "
                "it: M4oETrainer_noMAE, for both stages."
            )
        super().initialize()

    def _find_pool(self) -> UnlabeledPool:
        """Also whether every image has a modality."""
        pool = super()._find_pool()
        for case in pool.cases:
            self.cases.index(case)
        return pool

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``reconstruction``: mean squared error of the hidden voxels."""
        image, keys = batch["data"], batch.get("keys")
        if "unlabeled" in batch:
            image = torch.cat([image, self.views(batch["unlabeled"])[0]])
            keys = None if keys is None else [*keys, *batch["unlabeled_keys"]]
        return {"reconstruction": self.reconstruction_error(image, keys)}

    def reconstruction_error(self, image: Tensor, keys: Any) -> Tensor:
        """Mean squared error of hidden voxels of ``image`` ``(B, C, *patch)``."""
        out: ReconstructionOutput = self.network(image, modality=self.modality_of(keys, len(image)))
        return masked_error(out.reconstruction, out.target, out.mask, squared=True)

    # ------------------------------------------------------------------ validation
    def validation_step(self, batch: dict) -> dict:
        """The error on hidden voxels, and that of predicting the mean of the patch."""
        image = batch["data"].to(self.device, non_blocking=True)
        with self.autocast():
            error = self.reconstruction_error(image, batch["keys"])
        axes = tuple(range(2, image.ndim))
        return {"loss": error.float().cpu().numpy(), "variance": image.float().var(axes).mean().cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """In place of Dice: the share of the images' variance that is explained, at most 1."""
        sums = torch.tensor([[float(o["loss"]), float(o["variance"])] for o in val_outputs]).sum(0).to(self.device)
        if self.is_ddp:
            dist.all_reduce(sums)
        error, variance = sums.tolist()
        explained = 1 - error / max(variance, 1e-8)
        self.logger.log("mean_fg_dice", explained, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [np.float64(explained)], self.current_epoch)
        self.logger.log("val_losses", error / (len(val_outputs) * self._ranks), self.current_epoch)
        self.print_to_log_file(f"Explained variance of hidden voxels (nnU-Net prints it as Dice): {explained:.4f}")

    @property
    def _ranks(self) -> int:
        return dist.get_world_size() if self.is_ddp else 1

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing to segment: write down how well the last epoch reconstructed validation cases."""
        explained = self.logger.local_logger.my_fantastic_logging["mean_fg_dice"]
        if self.local_rank > 0 or not explained:
            return
        file = Path(self.output_folder) / "validation" / RECONSTRUCTION
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"explained_variance": float(explained[-1])}, indent=1) + "\n")
