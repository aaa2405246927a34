"""What the two latent methods share: diffusing the latents of masks, and decoding what the denoiser makes of noise."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule
from nnunet_diffext.diffusion.parameterization import PredictionKind, target, to_x0
from nnunet_diffext.networks.diffusion_net import DiffusionNet
from nnunet_diffext.networks.sampling import Sampling, draw
from nnunet_diffext.networks.unet import UNetOutput

TRUSTED_SIGNAL = 0.1
"""alpha_t from which on predicted noise counts fully in losses on the estimate, which it enters divided by alpha_t."""


class Denoised(NamedTuple):
    """One training pass of the denoiser.

    Attributes:
        prediction, target: what it predicted and should have, ``(B, k, *latent)``, float32.
        estimate: the clean latents that the prediction stands for.
        trust: ``(B, 1, 1, ...)`` in (0, 1], small where predicted noise says next to nothing about the clean latents.
        unet: all that the denoiser returned.
    """

    prediction: Tensor
    target: Tensor
    estimate: Tensor
    trust: Tensor
    unet: UNetOutput


class LatentDiffusionNet(DiffusionNet):
    """Diffusion in the latent space of a mask codec. Subclasses say what is known, and which network denoises.

    Args:
        codec: ``encode(onehot)``, ``decode(latents)``, ``channels``, ``level``, ``stride``.
        frozen_codec: it is not trained, and stays in eval mode.
        kind: what the denoiser predicts.
        label_space, schedule, sampling, terminal_share: see :class:`DiffusionNet`.
    """

    def __init__(
        self,
        codec: nn.Module,
        frozen_codec: bool,
        kind: PredictionKind,
        label_space: LabelSpace,
        schedule: NoiseSchedule,
        sampling: Sampling | None,
        terminal_share: float,
    ) -> None:
        super().__init__(label_space, schedule, sampling, terminal_share)
        self.codec, self.frozen_codec, self.kind = codec, frozen_codec, kind
        if frozen_codec:
            codec.eval().requires_grad_(False)

    @abstractmethod
    def denoise(self, known: Any, z_t: Tensor, t: Tensor) -> UNetOutput:
        """Prediction of ``kind`` (as logits) for noisy latents ``(B, k, *latent)`` at ``t`` ``(B,)``."""

    def clean_latents(self, estimate: Tensor) -> Tensor:
        """What becomes of the last estimate before it is decoded."""
        return estimate

    @property
    def noise_channels(self) -> int:
        """Channels of the latents."""
        return self.codec.channels

    @property
    def noise_stride(self) -> tuple[int, ...]:
        """Of the latents."""
        return self.codec.stride

    def train(self, mode: bool = True) -> LatentDiffusionNet:
        """A frozen codec stays in eval mode."""
        super().train(mode)
        if self.frozen_codec:
            self.codec.eval()
        return self

    def diffuse(self, known: Any, z0: Tensor, recycle: bool = False) -> Denoised:
        """Noise latents to random timesteps and denoise them in one step.

        Args:
            known: of the images.
            z0: clean latents ``(B, k, *latent)``.
            recycle: noise what the denoiser makes of pure noise instead of ``z0`` (Fu et al., MELBA 2023:016), as it is
                noised when samples are drawn. ``z0`` can be read from its noisy version without looking at the image
                for most t; the denoiser's own guess has to be corrected with the image. Only for ``kind`` "x0".
        """
        t = self.random_timesteps(len(z0), z0.device)
        noise = torch.randn_like(z0)
        z_t = self.schedule.add_noise(self.first_guess(known, z0) if recycle else z0, noise, t)
        out = self.denoise(known, z_t, t)
        prediction = out.logits.float()
        estimate = to_x0(prediction, z_t, t, self.schedule, self.kind)
        alpha, _ = self.schedule.marginal(t, z0.ndim)
        trust = (alpha / TRUSTED_SIGNAL).square().clamp(max=1) if self.kind == "eps" else torch.ones_like(alpha)
        return Denoised(prediction, target(self.kind, z0, noise, t, self.schedule), estimate, trust, out)

    @torch.no_grad()
    def first_guess(self, known: Any, z0: Tensor) -> Tensor:
        """Clean latents as they are predicted from pure noise, shaped like ``z0``."""
        noise = torch.randn_like(z0)
        t = torch.full((len(z0),), self.schedule.timesteps - 1, device=z0.device)
        guess = self.denoise(known, noise, t).logits.float()
        torch.clear_autocast_cache()  # before PyTorch 2.10, casts made here would hide gradients later (#112583)
        return to_x0(guess, noise, t, self.schedule, self.kind)

    def draw_probabilities(self, known: Any, noise: Tensor, *, steps: int, sampler: str, seed: int) -> Tensor:
        """See :class:`DiffusionNet`."""

        def model(z: Tensor, t: Tensor) -> Tensor:
            return self.denoise(known, z, t).logits

        z0 = draw(model, noise, self.schedule, steps, sampler, seed, kind=self.kind)
        return self.label_space.probabilities(self.codec.decode(self.clean_latents(z0)))
