"""Autoencoder of segmentation masks: what the latent methods diffuse in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.norm import LatentScale, LayerNorm
from nnunet_diffext.networks.latent import LatentDecoder, LatentEncoder


class AutoencoderOutput(NamedTuple):
    """Logits ``(B, K, *patch)`` of the reconstruction; the encoder's latents ``(B, k, *latent)``, not standardised."""

    logits: Tensor
    latents: Tensor


class MaskAutoencoder(nn.Module):
    """One-hot masks to latents of mean 0 and variance 1, and back to logits.

    Args:
        architecture: what nnU-Net planned.
        label_space: heads K.
        stride: at most so many voxels per latent in every axis; the stage follows from the planned strides.
        channels: k, of the latents.
        width: channels of the decoder, relative to the plan; it has one convolution per stage. The encoder is the
            planned one, so that an image encoder can start from its weights.
        noise: in training, the decoder sees latents with noise of this standard deviation, relative to theirs. What is
            decoded later are estimates.
    """

    def __init__(
        self,
        architecture: Architecture,
        label_space: LabelSpace,
        *,
        stride: int = 8,
        channels: int = 4,
        width: float = 0.5,
        noise: float = 0.2,
    ) -> None:
        super().__init__()
        plan = architecture.with_norm(LayerNorm)
        self.label_space, self.noise = label_space, noise
        self.level = architecture.level_within(stride)
        self.channels, self.stride = channels, architecture.stride_of(self.level)
        self.encoder = LatentEncoder(plan, label_space.num_heads, channels, self.level)
        self.decoder = LatentDecoder(plan.lighter(width), channels, label_space.num_heads, self.level)
        self.scale = LatentScale(channels)

    def encode(self, onehot: Tensor) -> Tensor:
        """``(B, K, *patch)`` -> standardised latents ``(B, k, *latent)``, float32."""
        return self.scale.standardise(self.encoder(onehot))

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> logits ``(B, K, *patch)``."""
        return self.decoder(self.scale.restore(latents))

    def forward(self, masks: Tensor) -> Tensor | AutoencoderOutput:
        """Reconstruct masks: logits ``(B, K, *patch)`` in eval mode, in training mode what the losses need.

        Args:
            masks: one-hot, bool ``(B, K, *patch)``.
        Raises:
            TypeError: for anything but bool, such as an image.
        """
        if masks.dtype is not torch.bool:
            raise TypeError(
                "A mask autoencoder reconstructs masks and cannot segment an image. Train a method that builds on it, "
                "for example -tr LEAFTrainer, and predict with that."
            )
        latents = self.encoder(masks.float())
        if not self.training:
            return self.decoder(latents)
        self.scale.update(latents)
        noise = self.noise * self.scale.std(latents.ndim) * torch.randn_like(latents)
        return AutoencoderOutput(self.decoder(latents + noise), latents)
