"""TextDiffSeg's network: image encoder with attention, text attention, label latents, denoiser, label decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule
from nnunet_diffext.diffusion.parameterization import PredictionKind
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.attention import SelfAttention, TextAttention, TextConcatenation
from nnunet_diffext.networks.blocks.norm import LayerNorm, standardise_sample
from nnunet_diffext.networks.latent import LatentDecoder, LatentEncoder
from nnunet_diffext.networks.latent_diffusion import LatentDiffusionNet
from nnunet_diffext.networks.sampling import Sampling
from nnunet_diffext.networks.unet import ConditionalUNet, UNetOutput

TEXT_FUSIONS = ("attention", "concatenation")


class TextDiffSegOutput(NamedTuple):
    """What the losses need.

    Attributes:
        prediction, target: of the denoiser, ``(B, k, *latent)``, float32 (eq. 5).
        logits: decoded from the estimate, ``(B, K, *patch)`` (eq. 4).
        trust: ``(B, 1, 1, ...)`` in (0, 1], weight of eq. 4 per sample.
        reconstruction: decoded from the label's own latents; ``None`` if they are frozen.
        latents: of the labels, ``(B, k, *latent)``.
    """

    prediction: Tensor
    target: Tensor
    logits: Tensor
    trust: Tensor
    reconstruction: Tensor | None
    latents: Tensor


class LabelCodec(nn.Module):
    """Label encoder and decoder that are trained with the denoiser (section II-C and II-D).

    Latents have mean 0 and variance 1 in every sample, by a normalisation without parameters.

    Args:
        architecture: what nnU-Net planned.
        label_space: heads K.
        stride, channels, width: as for :class:`~nnunet_diffext.networks.mask_autoencoder.MaskAutoencoder`.
        simple: ablation zeta_3: masks averaged over a latent's voxels, projected by a fixed matrix.
    """

    projection: Tensor

    def __init__(
        self,
        architecture: Architecture,
        label_space: LabelSpace,
        *,
        stride: int = 8,
        channels: int = 4,
        width: float = 0.5,
        simple: bool = False,
    ) -> None:
        super().__init__()
        plan = architecture.with_norm(LayerNorm).lighter(width)
        self.level = architecture.level_within(stride)
        self.channels, self.stride = channels, architecture.stride_of(self.level)
        self.encoder = None if simple else LatentEncoder(plan, label_space.num_heads, channels, self.level)
        if simple:
            fixed = torch.Generator().manual_seed(0)
            self.register_buffer("projection", torch.randn(channels, label_space.num_heads, generator=fixed))
        self.decoder = LatentDecoder(plan, channels, label_space.num_heads, self.level)

    def encode(self, onehot: Tensor) -> Tensor:
        """``(B, K, *patch)`` -> ``(B, k, *latent)``, float32."""
        if self.encoder is not None:
            return standardise_sample(self.encoder(onehot))
        pool = adaptive_avg_pool3d if onehot.ndim == 5 else adaptive_avg_pool2d
        shares = pool(onehot, [n // f for n, f in zip(onehot.shape[2:], self.stride, strict=True)])
        return standardise_sample(torch.einsum("ck,bk...->bc...", self.projection, shares))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents or estimates of them -> logits ``(B, K, *patch)``."""
        return self.decoder(standardise_sample(latents))


class Denoiser(ConditionalUNet):
    """Time-conditioned U-Net with self-attention at its deepest level (section II-D)."""

    def __init__(self, architecture: Architecture, image_channels: int, channels: int) -> None:
        super().__init__(architecture, image_channels, channels, channels)
        self.attention = SelfAttention(architecture.conv_op, architecture.features[-1])

    def encoder_stage(self, level: int, x: Tensor, condition: Tensor | None) -> Tensor:
        x = super().encoder_stage(level, x, condition)
        return self.attention(x) if level == len(self.encoder) - 1 else x


class TextDiffSegNet(LatentDiffusionNet):
    """Latent diffusion guided by image and text (Ma 2025, Fig. 1).

    Args:
        codec: ``encode(onehot)``, ``decode(latents)``, ``channels``, ``level``, ``stride``: a :class:`LabelCodec`, or a
            :class:`MaskAutoencoder` that was trained before.
        frozen_codec: it is not trained any more.
        architecture: what nnU-Net planned.
        image_channels: C.
        label_space: heads K.
        text_shape: N, L, D: prompts, tokens per prompt, width of a token.
        image_latents: channels of ``z_it``; ``None``: as many as the labels' (paper).
        text_fusion: cross-attention (eq. 2) or concatenation (ablation zeta_1).
        simple_image: ablation zeta_2: the image averaged over a latent's voxels instead of an encoder.
        denoiser_width: channels of the denoiser, relative to the plan; it runs at every step.
        kind, schedule, timesteps, zero_terminal_snr, terminal_share, sampling: see :class:`DiffusionNet`.
        stop_gradient: the diffusion loss does not reach the label encoder, which would make masks easy to guess rather
            than easy to decode.
        decoder_noise: on the estimates that the decoder is trained with, ``q(z|X) = N(z_dn, sigma^2 I)``.
    """

    tokens: Tensor
    token_mask: Tensor

    def __init__(
        self,
        codec: nn.Module,
        frozen_codec: bool,
        architecture: Architecture,
        image_channels: int,
        label_space: LabelSpace,
        text_shape: tuple[int, int, int],
        *,
        image_latents: int | None = None,
        text_fusion: str = "attention",
        simple_image: bool = False,
        denoiser_width: float = 0.5,
        kind: PredictionKind = "x0",
        schedule: str = "cosine",
        timesteps: int = 1000,
        zero_terminal_snr: bool = True,
        terminal_share: float = 0.0,
        stop_gradient: bool = True,
        decoder_noise: float = 0.1,
        sampling: Sampling | None = None,
    ) -> None:
        noise_schedule = NoiseSchedule(schedule, timesteps, zero_terminal_snr)
        super().__init__(codec, frozen_codec, kind, label_space, noise_schedule, sampling, terminal_share)
        a, conv = architecture, architecture.conv_op
        self.stop_gradient, self.decoder_noise = stop_gradient, decoder_noise
        latents = image_latents or codec.channels
        width = a.features[codec.level]
        self.pool = adaptive_avg_pool3d if conv is nn.Conv3d else adaptive_avg_pool2d
        self.encoder = conv(image_channels, width, 1) if simple_image else None
        if not simple_image:
            self.encoder = LatentEncoder(a, image_channels, None, codec.level, attentive=2)  # text comes before z_it
        fusion = {"attention": TextAttention, "concatenation": TextConcatenation}[text_fusion]
        self.text = fusion(conv, width, text_shape[2])
        self.to_condition = conv(width, latents, 1)
        self.denoiser = Denoiser(
            a.below(codec.level).with_norm(LayerNorm).lighter(denoiser_width), latents, codec.channels
        )
        self.register_buffer("tokens", torch.zeros(text_shape))
        self.register_buffer("token_mask", torch.ones(text_shape[:2], dtype=torch.bool))

    def known(self, image: Tensor) -> Tensor:
        """``z_it``: image features that have attended to the text, ``(B, image_latents, *latent)``."""
        return standardise_sample(self.to_condition(self.with_text(self.image_features(image))))

    def image_features(self, image: Tensor) -> Tensor:
        """``z_i`` ``(B, c, *latent)``."""
        if isinstance(self.encoder, LatentEncoder):
            return self.encoder(image)
        grid = [n // f for n, f in zip(image.shape[2:], self.codec.stride, strict=True)]
        return self.encoder(self.pool(image, grid))

    def with_text(self, features: Tensor) -> Tensor:
        """``z_fused`` (eq. 2)."""
        tokens, mask = self.tokens.flatten(0, 1)[None], self.token_mask.flatten()[None]
        return self.text(features, tokens.expand(len(features), -1, -1), mask.expand(len(features), -1))

    def forward(
        self, image: Tensor, *, clean: Tensor | None = None, recycle: bool = False
    ) -> Tensor | TextDiffSegOutput:
        """Logits ``(B, K, *patch)`` in eval mode; in training mode what the losses need.

        Args:
            image: ``(B, C, *patch)``.
            clean: one-hot masks ``(B, K, *patch)``, needed in training mode.
            recycle: see :meth:`diffuse`.
        """
        if not self.training:
            return self.label_space.log_probabilities(self.probabilities(image))
        own = self.codec.encode(clean)
        z0 = own.detach() if self.stop_gradient else own
        out = self.diffuse(self.known(image), z0, recycle)
        reconstruction = None if self.frozen_codec else self.codec.decode(self.jittered(own))
        logits = self.codec.decode(self.jittered(out.estimate))
        return TextDiffSegOutput(out.prediction, out.target, logits, out.trust, reconstruction, own)

    def jittered(self, latents: Tensor) -> Tensor:
        """What the decoder is trained with."""
        if not self.decoder_noise:
            return latents
        scaled = latents if self.frozen_codec else standardise_sample(latents)
        return scaled + self.decoder_noise * torch.randn_like(scaled)

    def denoise(self, known: Tensor, z_t: Tensor, t: Tensor) -> UNetOutput:
        """See :class:`LatentDiffusionNet`."""
        return self.denoiser(known, z_t, t)
