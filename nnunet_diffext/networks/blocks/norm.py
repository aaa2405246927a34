"""Normalisation layers that keep what instance norm removes, and that scale latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.GroupNorm):
    """Normalises a sample over channels and space together, with an affine map per channel.

    Instance norm turns a mask that is constant over the patch into zeros, whichever class it shows; here the pattern of
    the channels survives. Constructed like nnU-Net's norm layers.
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(1, channels, eps, affine)


class LatentScale(nn.Module):
    """Standardises latents ``(B, k, *)`` per channel with the statistics of the training masks.

    The statistics are buffers: they are measured while an autoencoder trains (Rombach et al. 2022 use one fixed factor)
    and travel with its weights.

    Args:
        channels: k.
        momentum: share of the old statistics that an update keeps.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, channels: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, latents: Tensor) -> None:
        """Take the latents of one batch into account; the first ones count equally."""
        axes = (0, *range(2, latents.ndim))
        mean, square = latents.float().mean(axes), latents.float().square().mean(axes)
        self.updates += 1
        new = max(1 - self.momentum, 1 / float(self.updates))
        before = self.variance + self.mean.square() if self.updates > 1 else torch.zeros_like(square)
        self.mean.lerp_(mean, new)
        self.variance.copy_((before.lerp(square, new) - self.mean.square()).clamp_min(1e-8))

    def std(self, ndim: int) -> Tensor:
        """``(1, k, 1, ...)``."""
        return self.variance.sqrt().view(1, -1, *(1,) * (ndim - 2))

    def standardise(self, latents: Tensor) -> Tensor:
        """To mean 0 and variance 1, float32."""
        mean = self.mean.view(1, -1, *(1,) * (latents.ndim - 2))
        return (latents.float() - mean) / self.std(latents.ndim)

    def restore(self, standardised: Tensor) -> Tensor:
        """Inverse of :meth:`standardise`."""
        mean = self.mean.view(1, -1, *(1,) * (standardised.ndim - 2))
        return standardised.float() * self.std(standardised.ndim) + mean


def standardise_sample(latents: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over channels and space of every sample, nothing learnt, float32 (TextDiffSeg, II-D).

    A learnt scale would let the encoder make the noise easy to tell from the signal by growing without bound.
    """
    x = latents.float()
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
