"""Attention on feature maps: of voxels to each other, and of voxels to the tokens of a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d, scaled_dot_product_attention

from nnunet_diffext.diffusion.schedules import autocast_off
from nnunet_diffext.networks.blocks.norm import LayerNorm

HEAD_WIDTH = 16
"""Channels per head, at most."""
MAX_KEYS = 512
"""Voxels that are attended to; finer maps are pooled, or memory would grow with the square of their size."""


class _Attention(nn.Module):
    """Pre-norm multi-head attention with a residual, always in float32: sums over thousands of tokens overflow fp16.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: of the feature map.
        key_channels: of what is attended to.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, key_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // HEAD_WIDTH)
        while channels % self.heads:
            self.heads -= 1
        self.norm = LayerNorm(channels)
        self.query = conv_op(channels, channels, 1)
        self.key, self.value = nn.Linear(key_channels, channels), nn.Linear(key_channels, channels)
        self.out = conv_op(channels, channels, 1)

    def attend(self, x: Tensor, normed: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x + out(attention)`` ``(B, C, *)``; ``keys`` ``(B, L, key_channels)``, ``mask`` bool ``(B, L)``."""
        q = self._split(self.query(normed).flatten(2).transpose(1, 2))
        k, v = self._split(self.key(keys)), self._split(self.value(keys))
        mask = None if mask is None else mask[:, None, None]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(2, 3).reshape(x.shape))

    def _split(self, tokens: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, heads, N, C / heads)``."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SelfAttention(_Attention):
    """Voxels attend to each other, or to at most :data:`MAX_KEYS` averages of them."""

    def __init__(self, conv_op: type[nn.Module], channels: int) -> None:
        super().__init__(conv_op, channels, channels)
        self.pool = adaptive_avg_pool3d if conv_op is nn.Conv3d else adaptive_avg_pool2d

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, *)`` -> ``(B, C, *)``."""
        with autocast_off(x.device):
            normed = self.norm(x.float())
            keys = self.pool(normed, _at_most(normed.shape[2:], MAX_KEYS)).flatten(2).transpose(1, 2)
            return self.attend(x.float(), normed, keys)


class TextAttention(_Attention):
    """Eq. 2 of TextDiffSeg: queries are voxels, keys and values are the tokens of the prompts.

    With a single vector for the text, as eq. 1 and 2 read, the softmax over one key is 1 everywhere, and every voxel
    receives the same constant. Tokens let it differ.
    """

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """``x`` ``(B, C, *)``, ``tokens`` ``(B, L, D)``, ``mask`` bool ``(B, L)`` (False: padding) -> ``(B, C, *)``."""
        with autocast_off(x.device):
            return self.attend(x.float(), self.norm(x.float()), tokens.float(), mask)

    @torch.no_grad()
    def weights(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Attention of every voxel to every token, mean over heads: ``(B, L, *)``."""
        q = self._split(self.query(self.norm(x.float())).flatten(2).transpose(1, 2))
        scores = q @ self._split(self.key(tokens.float())).transpose(2, 3) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).mean(1)
        return weights.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class TextConcatenation(nn.Module):
    """Ablation zeta_1: the mean token, projected, as channels of every voxel ("direct feature concatenation")."""

    def __init__(self, conv_op: type[nn.Module], channels: int, key_channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(key_channels, channels)
        self.merge = conv_op(2 * channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`TextAttention.forward`."""
        share = mask.float() / mask.sum(1, keepdim=True)
        text = self.project(torch.einsum("bl,bld->bd", share, tokens.float())).to(x.dtype)
        broadcast = text.view(*text.shape, *(1,) * (x.ndim - 2)).expand_as(x)
        return self.merge(torch.cat([x, broadcast], dim=1))


def _at_most(size: torch.Size, voxels: int) -> list[int]:
    """The size, its longest axes halved until it has at most so many voxels."""
    size = list(size)
    while torch.Size(size).numel() > voxels:
        longest = size.index(max(size))
        size[longest] = (size[longest] + 1) // 2
    return size
