"""The mask autoencoder of the latent methods, as an ordinary nnU-Net training on the labels alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffext.data.dataset import foreground
from nnunet_diffext.files import RECONSTRUCTION, write_atomically
from nnunet_diffext.networks.mask_autoencoder import AutoencoderOutput, MaskAutoencoder
from nnunet_diffext.settings import setting
from nnunet_diffext.trainers.adam import AdamSettings, AdamTrainer
from nnunet_diffext.trainers.configured import CUDA


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(AdamSettings):
    """Settings of :class:`MaskAutoencoderTrainer`."""

    epochs: int = setting(100, "number of epochs", number="#epochs", minimum=1)
    initial_lr: float = setting(2e-3, "initial learning rate of AdamW, decayed with power 0.9", number="lr#", minimum=0)
    stride: int = setting(
        8, "at most so many voxels per latent in every axis; the planned strides decide which", number="stride#",
        minimum=1,
    )  # fmt: skip
    channels: int = setting(4, "channels of the latents", number="channels#", minimum=1)
    width: float = setting(0.5, "channels of the decoder, relative to the plan", number="width#", minimum=0.01)
    noise: float = setting(
        0.2,
        "noise on the latents that the decoder is trained with, relative to their spread",
        number="noise#",
        minimum=0,
    )
    size_weight: float = setting(
        1e-4, "weight of the latents' mean square, which keeps them from growing", number="size#", minimum=0
    )


class MaskAutoencoderTrainer(AdamTrainer):
    """Compresses segmentation masks, for LEAFTrainer and TextDiffSegTrainer. Sees labels only."""

    Settings = AutoencoderSettings
    base_name = "MaskAutoencoderTrainer"

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        # It segments nothing for the second stage of a cascade, and does not look at what the first one segmented.
        self.is_cascaded, self.folder_with_segs_from_previous_stage = False, None

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """:class:`MaskAutoencoder` from the plans alone."""
        s, label_space, architecture = MaskAutoencoderTrainer.read_plans(plans_manager, configuration_manager)
        return MaskAutoencoder(
            architecture, label_space, stride=s.stride, channels=s.channels, width=s.width, noise=s.noise
        )

    def loss_weights(self) -> Mapping[str, float]:
        """Of ``size``."""
        return {"size": self.settings.size_weight}

    def compute_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``sup``: Dice + CE of the reconstruction; ``size``: mean square of the latents."""
        clean, valid = self.label_space.encode(batch["target"])
        out: AutoencoderOutput = self.network(clean.bool())
        return {"sup": self.segmentation_loss(out.logits, clean, valid), "size": out.latents.square().mean()}

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, on reconstructions of the masks."""
        clean, _ = self.label_space.encode(batch["target"])
        return super().validation_step({**batch, "data": clean.bool()})

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing to predict: write down how well the last epoch reconstructed masks of validation cases."""
        dice = self.logger.local_logger.my_fantastic_logging["dice_per_class_or_region"]
        if self.local_rank > 0 or not dice:
            return
        names = foreground(self.dataset_json, unique=False)
        named = dict(zip(names, map(float, dice[-1]), strict=True))
        file = Path(self.output_folder) / "validation" / RECONSTRUCTION
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"dice": named}, indent=1) + "\n")
        self.print_to_log_file("Reconstruction Dice:", ", ".join(f"{name} {d:.4f}" for name, d in named.items()))
