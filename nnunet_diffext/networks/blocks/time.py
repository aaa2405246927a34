"""Conditioning on the diffusion time: sinusoidal embedding and feature-wise modulation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep (Vaswani et al. 2017; Ho et al. 2020), followed by an MLP.

    Args:
        channels: width of the sinusoidal code and of the result, even.
    """

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        frequencies = torch.exp(-math.log(10_000) * torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        """``(B,)`` integer timesteps -> ``(B, channels)``."""
        angles = t.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class FiLM(nn.Module):
    """Feature-wise modulation ``act((1 + scale(t)) * h + shift(t))`` (Perez et al. 2018).

    Without the activation after it, the next convolution's instance norm would remove the constant shift.
    """

    def __init__(self, time_channels: int, channels: int) -> None:
        super().__init__()
        self.to_scale_shift = nn.Linear(time_channels, 2 * channels)
        nn.init.normal_(self.to_scale_shift.weight, std=0.02)
        nn.init.zeros_(self.to_scale_shift.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """``h``: ``(B, C, *)``, ``embedding``: ``(B, time_channels)`` -> ``(B, C, *)``."""
        scale, shift = self.to_scale_shift(embedding).to(h.dtype).chunk(2, dim=1)
        shape = (*scale.shape, *(1,) * (h.ndim - 2))
        return nn.functional.leaky_relu(torch.addcmul(shift.view(shape), h, 1 + scale.view(shape)), 0.01)
