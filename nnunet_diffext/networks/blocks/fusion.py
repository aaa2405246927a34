"""Dynamic Fusion Module of DMED-Seg (eq. 1): a small transformer decides where to trust which expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunet_diffext.diffusion.schedules import autocast_off


class FusionOutput(NamedTuple):
    """Fused logits ``(B, K, *patch)``; expert weights ``(B, 2, *)`` per scale, finest first, which sum to one."""

    logits: Tensor
    weights: list[Tensor]


class ExpertAttention(nn.Module):
    """One pre-norm transformer layer over the two expert tokens of a location.

    Attention across locations is out of reach in 3D (10^4 to 10^5 tokens per scale); across the two
    experts it costs next to nothing.

    Args:
        dim: token width d.
        heads: attention heads.
        mlp_ratio: width of the MLP relative to ``dim``.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(M, 2, d)`` -> ``(M, 2, d)``."""
        m, n, d = tokens.shape
        q, k, v = self.qkv(self.norm_attention(tokens)).view(m, n, 3, self.heads, d // self.heads).unbind(2)
        # For two tokens, softmax(q k_0, q k_1) = (1 - a, a) with a = sigmoid(q (k_1 - k_0)): no 2 x 2 maps, which would
        # be the largest tensors of the module. Fused attention kernels refuse 10^5 (batch x head) blocks.
        a = (q * (k[:, 1:] - k[:, :1])).sum(-1, keepdim=True).mul((d // self.heads) ** -0.5).sigmoid()
        mixed = v[:, :1] + a * (v[:, 1:] - v[:, :1])  # (M, 2, heads, d / heads)
        tokens = tokens + self.project(mixed.reshape(m, n, d))
        return tokens + self.mlp(self.norm_mlp(tokens))


class DynamicFusion(nn.Module):
    """Weights and fuses the two experts' features at up to four scales, 1/2 ... 1/16 (section 3.4, eq. 1).

    The fused features of every scale are read out by a 1x1 convolution and summed at full resolution, where the weights
    of the finest scale apply. With ``fuse_predictions`` the experts' logits, weighted in the same way, are added
    ("fuses features and predictions").

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: channels of every level, finest (full resolution) first; both experts have the same.
        num_classes: K.
        dim, heads, layers: size of the transformer; the paper's are 4 heads and 2 layers.
        max_scales: how many levels below full resolution are fused.
        fuse_predictions: add the weighted expert logits.
    """

    def __init__(
        self,
        conv_op: type[nn.Module],
        channels: Sequence[int],
        num_classes: int,
        *,
        dim: int = 16,
        heads: int = 4,
        layers: int = 2,
        max_scales: int = 4,
        fuse_predictions: bool = True,
    ) -> None:
        super().__init__()
        self.channels = list(channels[: max_scales + 1])
        self.fuse_predictions = fuse_predictions
        self.mode = "trilinear" if conv_op is nn.Conv3d else "bilinear"
        scales = self.channels[1:]
        self.project_de = nn.ModuleList(nn.Linear(c, dim) for c in scales)
        self.project_ce = nn.ModuleList(nn.Linear(c, dim) for c in scales)
        self.scale_embedding = nn.Parameter(torch.randn(len(scales), 1, 1, dim) * 0.02)
        self.attention = nn.ModuleList(ExpertAttention(dim, heads) for _ in range(layers))
        # no biases: the softmax over the experts would remove them
        self.score = nn.Sequential(nn.LayerNorm(dim, bias=False), nn.Linear(dim, 1, bias=False))
        # Read out per scale: 1x1 convolutions commute with blending and interpolation, so merging the fused features
        # first and reading out once would be the same function, with more parameters and memory.
        self.seg_layers = nn.ModuleList(conv_op(c, num_classes, 1) for c in self.channels)

    def scale_weights(self, scale: int, de: Tensor, ce: Tensor) -> Tensor:
        """Weights of the two experts, ``(B, 2, *)``, from their features ``(B, C, *)`` at one scale. Always fp32."""
        with autocast_off(de.device):
            tokens = torch.stack(
                [self.project_de[scale](_flat(de).float()), self.project_ce[scale](_flat(ce).float())], dim=2
            )  # (B, N, 2, d)
            tokens = (tokens + self.scale_embedding[scale]).flatten(0, 1)
            for layer in self.attention:
                tokens = layer(tokens)
            weights = self.score(tokens).squeeze(-1).softmax(dim=-1)
        return weights.view(de.shape[0], -1, 2).transpose(1, 2).reshape(de.shape[0], 2, *de.shape[2:])

    def forward(self, de: Sequence[Tensor], ce: Sequence[Tensor], de_logits: Tensor, ce_logits: Tensor) -> FusionOutput:
        """Feature lists are finest first, level by level of the same shape; logits are ``(B, K, *patch)``."""
        weights = [self.scale_weights(s, de[s + 1], ce[s + 1]) for s in range(len(self.channels) - 1)]
        full_de, full_ce = self.seg_layers[0](de[0]), self.seg_layers[0](ce[0])
        if self.fuse_predictions:
            full_de, full_ce = full_de + de_logits, full_ce + ce_logits
        logits = _blend(self.resize(weights[0], full_ce), full_de, full_ce)
        for w, f_de, f_ce, read_out in zip(weights, de[1:], ce[1:], self.seg_layers[1:], strict=False):
            logits = logits + self.resize(read_out(_blend(w, f_de, f_ce)), logits)
        return FusionOutput(logits, weights)

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        """Interpolate linearly to the spatial size of ``like``."""
        return interpolate(x, size=like.shape[2:], mode=self.mode)


def _blend(weights: Tensor, de: Tensor, ce: Tensor) -> Tensor:
    """Eq. 1: ``w_DE F_DE + w_CE F_CE``."""
    weights = weights.to(ce.dtype)
    return weights[:, :1] * de + weights[:, 1:] * ce


def _flat(features: Tensor) -> Tensor:
    """``(B, C, *)`` -> ``(B, N, C)``."""
    return features.flatten(2).transpose(1, 2)
