"""LEAF's network: latent diffusion that predicts the clean mask latent in one step (Huang et al., MICCAI 2025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule
from nnunet_diffext.diffusion.parameterization import PredictionKind
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.norm import LayerNorm
from nnunet_diffext.networks.latent import LatentEncoder
from nnunet_diffext.networks.latent_diffusion import LatentDiffusionNet
from nnunet_diffext.networks.sampling import Sampling
from nnunet_diffext.networks.unet import ConditionalUNet, UNetOutput


class LEAFOutput(NamedTuple):
    """What the losses need.

    Attributes:
        prediction, target: what the network predicted and should have, ``(B, k, *latent)``, float32.
        estimate: the clean latent that the prediction stands for.
        trust: ``(B, 1, 1, ...)`` in (0, 1], small where predicted noise says next to nothing about the clean latent.
        features: of the U-Net's encoder level that is aligned, ``(B, C, *level)``.
    """

    prediction: Tensor
    target: Tensor
    estimate: Tensor
    trust: Tensor
    features: Tensor


class LEAFNet(LatentDiffusionNet):
    """Frozen mask codec, trainable image encoder, time-conditioned U-Net on ``concat(z_x, z_t)`` (Fig. 1).

    The U-Net's stages are those that nnU-Net planned below the codec's resolution. Only masks pass through the decoder,
    which can therefore be small; that is where the time of the planned U-Net's finest stages is saved.

    Args:
        codec: frozen; ``encode(onehot)``, ``decode(latents)``, ``channels``, ``level``, ``stride``. One that has
            ``image_encoder()`` brings the image encoder along (paper: a trainable copy of its own).
        architecture: what nnU-Net planned.
        image_channels: C.
        label_space: heads K.
        image_latents: channels of ``z_x``; ``None``: as many as the masks' (paper).
        align_level: of the U-Net's encoder, 0 = the latents' resolution; at most its deepest level.
        kind, schedule, timesteps, zero_terminal_snr: see :class:`NoiseSchedule` and ``parameterization``.
        terminal_share: share of the training samples at t = T - 1, from where predictions are made; the others are
            uniform in t.
        clip_latents: clamp estimates to [-1, 1], as the authors' code does by default.
        sampling: of :meth:`forward` in eval mode.
    """

    def __init__(
        self,
        codec: nn.Module,
        architecture: Architecture,
        image_channels: int,
        label_space: LabelSpace,
        *,
        image_latents: int | None = None,
        align_level: int = 1,
        kind: PredictionKind = "x0",
        schedule: str = "latent_linear",
        timesteps: int = 1000,
        zero_terminal_snr: bool = True,
        terminal_share: float = 0.25,
        clip_latents: bool = False,
        sampling: Sampling | None = None,
    ) -> None:
        noise_schedule = NoiseSchedule(schedule, timesteps, zero_terminal_snr)
        super().__init__(codec, True, kind, label_space, noise_schedule, sampling, terminal_share)
        self.clip_latents = clip_latents
        if hasattr(codec, "image_encoder"):
            image_latents, self.encoder = codec.channels, codec.image_encoder()
        else:
            image_latents = image_latents or codec.channels
            self.encoder = LatentEncoder(architecture, image_channels, image_latents, codec.level)
        below = architecture.below(codec.level).with_norm(LayerNorm)
        self.align_level = min(align_level, len(below.features) - 1)
        self.align_channels = below.features[self.align_level]
        self.unet = ConditionalUNet(below, image_latents, codec.channels, codec.channels)

    @torch.no_grad()
    def start_from_codec(self) -> int:
        """Copy the codec's encoder into the image encoder where names and shapes agree; how many tensors did."""
        # a pretrained codec's weights may have been loaded after its image encoder was made
        source = self.codec.image_encoder() if hasattr(self.codec, "image_encoder") else self.codec.encoder
        here, there = self.encoder.state_dict(), source.state_dict()
        same = {k: v for k, v in there.items() if k in here and here[k].shape == v.shape}
        self.encoder.load_state_dict(same, strict=False)
        return len(same)

    def forward(self, image: Tensor, *, clean: Tensor | None = None, recycle: bool = False) -> Tensor | LEAFOutput:
        """Logits ``(B, K, *patch)`` in eval mode; in training mode what the losses need.

        Args:
            image: ``(B, C, *patch)``.
            clean: one-hot masks ``(B, K, *patch)``, needed in training mode.
            recycle: see :meth:`diffuse`.
        """
        if not self.training:
            return self.label_space.log_probabilities(self.probabilities(image))
        out = self.diffuse(self.known(image), self.encode_masks(clean), recycle)
        features = out.unet.encoder[self.align_level]
        return LEAFOutput(out.prediction, out.target, out.estimate, out.trust, features)

    @torch.no_grad()
    def encode_masks(self, clean: Tensor) -> Tensor:
        """``z_0`` ``(B, k, *latent)`` of one-hot masks ``(B, K, *patch)``."""
        return self.codec.encode(clean)

    def known(self, image: Tensor) -> Tensor:
        """``z_x``."""
        return self.encoder(image)

    def denoise(self, known: Tensor, z_t: Tensor, t: Tensor) -> UNetOutput:
        """See :class:`LatentDiffusionNet`."""
        return self.unet(known, z_t, t)

    def clean_latents(self, estimate: Tensor) -> Tensor:
        """Clamped only if ``clip_latents``."""
        return estimate.clamp(-1, 1) if self.clip_latents else estimate
