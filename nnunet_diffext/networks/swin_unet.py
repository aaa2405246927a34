"""Swin U-Nets in 2D and 3D, at the resolutions that nnU-Net planned. Cao et al. 2021 have no convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.experts import Routing
from nnunet_diffext.networks.blocks.linear import linear
from nnunet_diffext.networks.blocks.patches import PatchEmbedding, PatchExpanding, PatchMerging
from nnunet_diffext.networks.blocks.window import SwinBlock, window_for

FFN = Callable[[int], nn.Module]
"""Makes what stands behind the attention of a block, from its channels."""
MLP_RATIO = 4
"""Hidden channels of an MLP or expert, relative to the tokens' channels."""


@dataclass(frozen=True)
class SwinPlan:
    """Sizes of a Swin U-Net. All sequences start at the finest level.

    Attributes:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        embed_stride: voxels per token of the finest level, for every axis.
        strides: from every level to the next coarser one.
        grids: tokens of every level.
        windows: tokens of a window.
        widths: channels.
        heads: of the attention.
        drop_path: for every level the rates of its blocks.
        final_width: channels at the resolution of the image.
        convolutions: makes those at the resolution of the image from channels and width; none in a Swin-UNet.
    """

    conv_op: type[nn.Module]
    embed_stride: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    grids: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    drop_path: tuple[tuple[float, ...], ...]
    final_width: int
    convolutions: Callable[[int, int], nn.Module] | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        patch_size: Sequence[int],
        *,
        embed_stride: int | None = None,
        stages: int = 4,
        embed_dim: int | None = None,
        depth: int = 2,
        window: int = 7,
        drop_path: float = 0.2,
        stem: bool = True,
    ) -> SwinPlan:
        """A Swin U-Net that halves the resolution where nnU-Net's network does.

        Args:
            architecture: what nnU-Net planned; its strides are followed.
            patch_size: voxels.
            embed_stride: at most so many voxels per token in every axis; default 4 in 2D, 2 in 3D.
            stages: levels at most; fewer if fewer are planned below the embedding.
            embed_dim: channels of the finest level, doubled at every other; default 96 in 2D, 48 in 3D.
            depth: blocks per level, every other one shifted.
            window: tokens per axis, about (see :func:`window_for`).
            drop_path: rate of the deepest block; it rises linearly from 0.
            stem: convolutions at the resolution of the image, before the tokens and behind the decoder, with a skip
                connection and at most the channels that nnU-Net planned there.
        Raises:
            ValueError: the patch is not divisible, or there are fewer than two levels.
        """
        architecture.check_patch(patch_size)
        flat = architecture.dim == 2
        dim = embed_dim or (96 if flat else 48)
        first = architecture.level_within(embed_stride or (4 if flat else 2))
        strides = architecture.strides[first + 1 :][: stages - 1]
        if not strides:
            raise ValueError(
                f"A Swin U-Net needs at least two levels, but stages={stages} and {len(architecture.strides)} planned "
                f"stages leave one: plan with more stages, or allow more levels."
            )
        grids = [[p // s for p, s in zip(patch_size, architecture.stride_of(first), strict=True)]]
        for stride in strides:
            grids.append([g // s for g, s in zip(grids[-1], stride, strict=True)])
        widths = tuple(dim * 2**level for level in range(len(grids)))
        final = dim if flat else max(1, dim // 2)
        rates = torch.linspace(0, drop_path, depth * len(grids), device="cpu").tolist()
        return cls(
            conv_op=architecture.conv_op,
            embed_stride=architecture.stride_of(first),
            strides=tuple(strides),
            grids=tuple(tuple(grid) for grid in grids),
            windows=tuple(window_for(grid, window) for grid in grids),
            widths=widths,
            heads=tuple(_heads(width, 32 if flat else 16) for width in widths),
            drop_path=tuple(tuple(rates[level * depth : (level + 1) * depth]) for level in range(len(grids))),
            final_width=min(final, architecture.features[0]) if stem else final,
            convolutions=partial(architecture.convolutions, 2, level=0) if stem else None,
        )

    def blocks(self, level: int, ffn: FFN) -> nn.ModuleList:
        """The blocks of one level, every other one shifted."""
        rates = enumerate(self.drop_path[level])
        return nn.ModuleList(self.block(level, ffn, index % 2 == 1, rate) for index, rate in rates)

    def block(self, level: int, ffn: FFN, shifted: bool = False, drop_path: float = 0.0) -> SwinBlock:
        """One block of a level."""
        dim = self.widths[level]
        return SwinBlock(
            dim, self.heads[level], ffn(dim),
            grid=self.grids[level], window=self.windows[level], shifted=shifted, drop_path=drop_path,
        )  # fmt: skip


def _heads(channels: int, width: int) -> int:
    """Heads of about ``width`` channels each that divide the channels."""
    heads = max(1, channels // width)
    while channels % heads:
        heads -= 1
    return heads


class SwinEncoder(nn.Module):
    """Patch embedding, then levels of Swin blocks with patch merging in between.

    Before the embedding stand two convolutions, unless the plan leaves them out: transformers learn faster behind them
    (Xiao et al. 2021), and the decoder has something to join at the resolution of the image.

    Args:
        plan: sizes.
        image_channels: C.
        ffn: of every block.
    """

    def __init__(self, plan: SwinPlan, image_channels: int, ffn: FFN) -> None:
        super().__init__()
        make, channels = plan.convolutions, image_channels
        self.stem: nn.Module | None = None
        if make is not None:
            self.stem, channels = make(image_channels, plan.final_width), plan.final_width
        self.embedding = PatchEmbedding(plan.conv_op, channels, plan.widths[0], plan.embed_stride)
        self.levels = nn.ModuleList(plan.blocks(level, ffn) for level in range(len(plan.grids)))
        self.merging = nn.ModuleList(PatchMerging(w, s) for w, s in zip(plan.widths, plan.strides, strict=False))
        self.norm = nn.LayerNorm(plan.widths[-1])

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, C, *patch)`` -> tokens of the finest level ``(B, *grid, C)``; what the convolutions found
        ``(B, final_width, *patch)``.
        """
        fine = None if self.stem is None else self.stem(image)
        return self.embedding(image if fine is None else fine), fine

    def forward(self, tokens: Tensor, routing: Routing | None = None) -> list[Tensor]:
        """Embedded patches ``(B, *grid, C)`` -> tokens of every level, finest first; the deepest ones normalised."""
        features = []
        for level, blocks in enumerate(self.levels):
            x = self.merging[level - 1](features[-1]) if level else tokens
            for block in blocks:
                x = block(x, routing)
            features.append(x)
        return [*features[:-1], self.norm(features[-1])]


class SwinDecoder(nn.Module):
    """Patch expanding, the encoder's tokens joined by a linear layer, Swin blocks; at last to the image's resolution.

    The joined tokens are those behind a level's blocks (Cao et al., Fig. 1); their code joins those before. What the
    encoder's convolutions found is joined at last, by two more (as in Swin UNETR, Hatamizadeh et al. 2022).

    Args:
        plan: sizes.
        ffn: of every block.
    """

    def __init__(self, plan: SwinPlan, ffn: FFN) -> None:
        super().__init__()
        levels = range(len(plan.strides))[::-1]
        widths = plan.widths
        self.expanding = nn.ModuleList(PatchExpanding(widths[i + 1], plan.strides[i], widths[i]) for i in levels)
        self.join = nn.ModuleList(linear(2 * widths[i], widths[i]) for i in levels)
        self.levels = nn.ModuleList(plan.blocks(i, ffn) for i in levels)
        self.norm = nn.LayerNorm(widths[0])
        self.to_voxels = PatchExpanding(widths[0], plan.embed_stride, plan.final_width)
        self.last: nn.Module | None = None
        if plan.convolutions is not None:
            self.last = plan.convolutions(2 * plan.final_width, plan.final_width)

    def forward(self, features: Sequence[Tensor], fine: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Tokens of every level, finest first -> ``(B, *patch, final_width)``.

        Args:
            features: of the encoder.
            fine: ``(B, final_width, *patch)``, what its convolutions found; needed if there are some.
            routing: for the blocks.
        """
        x = features[-1]
        for expand, join, blocks, skip in zip(self.expanding, self.join, self.levels, features[-2::-1], strict=True):
            x = join(torch.cat([expand(x), skip], dim=-1))
            for block in blocks:
                x = block(x, routing)
        x = self.to_voxels(self.norm(x))
        if self.last is None:
            return x
        # contiguous: the product of the heads is else rounded by where its operands happen to lie
        return self.last(torch.cat([x.movedim(-1, 1), fine], dim=1)).movedim(1, -1).contiguous()
