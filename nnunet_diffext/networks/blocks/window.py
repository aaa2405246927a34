"""Attention within windows of a 2D or 3D grid (Liu et al. 2021). Tokens are channels-last: ``(B, *grid, C)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from dynamic_network_architectures.building_blocks.regularization import DropPath
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from nnunet_diffext.diffusion.schedules import autocast_off
from nnunet_diffext.networks.blocks.experts import Routing
from nnunet_diffext.networks.blocks.linear import STD, linear
from nnunet_diffext.networks.blocks.patches import split, to_grid


def window_for(grid: Sequence[int], window: int) -> tuple[int, ...]:
    """Size of the windows along every axis; the whole axis where that is not longer than ``window``.

    Otherwise the first of ``window``, ``window + 1``, ``window - 1``, ... down to half of it that pads the grid least.

    >>> window_for((56, 64, 11, 5), 7)
    (7, 8, 6, 5)
    """
    sizes = (window, window + 1, *range(window - 1, (window - 1) // 2, -1))
    return tuple(g if g <= window else min(sizes, key=lambda size: -g % size) for g in grid)


class Windows(NamedTuple):
    """How a grid is cut into windows.

    Attributes:
        shift: cyclic shift of every axis; 0 where one window covers it.
        padded: the grid, rounded up to whole windows.
        groups: windows (numbers in row-major order) whose tokens have the same labels along every axis: 1 where the
            shift has wrapped around, -1 for padding, otherwise 0. Empty where there is neither.
    """

    shift: tuple[int, ...]
    padded: tuple[int, ...]
    groups: dict[tuple[tuple[int, ...], ...], list[int]]

    def tables(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The windows in the order of their groups ``(W,)``, and for every group, which token may attend to which: bool
        ``(groups, N, N)``. ``None``, ``None`` if there are no groups.
        """
        if not self.groups:
            return None, None
        order = [number for numbers in self.groups.values() for number in numbers]
        masks = torch.stack([_mask(labels) for labels in self.groups])
        return torch.tensor(order, device=device), masks.to(device)


@lru_cache(maxsize=256)
def cut(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> Windows:
    """The windows of a grid.

    Tokens that a shift brings together from opposite ends of the grid do not see each other, and nobody sees padding.
    Along one axis only the last two windows can differ from the others: few masks serve all windows, where one for each
    would take gigabytes in 3D.
    """
    padded = tuple(-(-g // w) * w for g, w in zip(grid, window, strict=True))
    shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True))
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    if any(shift) or padded != grid:
        axes = [_axis_labels(*sizes) for sizes in zip(grid, padded, window, shift, strict=True)]
        for number, labels in enumerate(product(*axes)):
            groups.setdefault(labels, []).append(number)
    return Windows(shift, padded, groups)


def _axis_labels(size: int, padded: int, window: int, shift: int) -> list[tuple[int, ...]]:
    """Labels of the tokens of every window along one axis, see :class:`Windows`."""
    labels = []
    for place in range(padded):
        exists = (place + shift) % padded < size
        labels.append(int(place + shift >= padded) if exists else -1)
    return [tuple(labels[i : i + window]) for i in range(0, padded, window)]


def _mask(labels: Sequence[Sequence[int]]) -> Tensor:
    """Labels of one window's tokens along every axis -> bool ``(N, N)`` on the CPU."""
    grids = torch.meshgrid(*(torch.tensor(axis, device="cpu") for axis in labels), indexing="ij")
    token = torch.stack([g.flatten() for g in grids], dim=1)
    exists = (token >= 0).all(1)
    same = (token[:, None] == token[None]).all(2)
    # padding looks at all that exists: a row without any key would be NaN, and so would its gradient
    return exists[None] & (same | ~exists[:, None])


def relative_index(window: Sequence[int]) -> Tensor:
    """Row of the bias table for every pair of tokens of a window: ``(N, N)`` (Liu et al. 2021, section 3.2)."""
    places = torch.cartesian_prod(*(torch.arange(w) for w in window)).view(-1, len(window))
    offsets = places[:, None] - places[None] + torch.tensor(window) - 1
    index = torch.zeros_like(offsets[..., 0])
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + offsets[..., axis]
    return index


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(B, *grid, C)`` -> ``(W, B, N, C)``: W windows of N tokens."""
    axes = len(window)
    return split(x, window).flatten(1 + axes, -2).flatten(1, axes).transpose(0, 1)


def assemble(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Inverse of :func:`partition`."""
    count = [g // w for g, w in zip(grid, window, strict=True)]
    return to_grid(windows.transpose(0, 1).flatten(2).unflatten(1, count), window)


class WindowAttention(nn.Module):
    """Multi-head attention within windows with a learnt bias per relative position, always in float32.

    Args:
        dim: channels.
        heads: they divide the channels.
        grid: tokens for which tables are held; for other grids they are made in every pass.
        window: tokens per window, for every axis.
        shifted: windows are moved by half of their size.
    """

    index: Tensor
    order: Tensor | None
    masks: Tensor | None

    def __init__(
        self, dim: int, heads: int, *, grid: Sequence[int], window: Sequence[int], shifted: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.grid, self.window, self.shifted = heads, tuple(grid), tuple(window), shifted
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)
        self.bias = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.bias, std=STD)
        self.register_buffer("index", relative_index(self.window), persistent=False)
        self.windows = cut(self.grid, self.window, shifted)
        for name, table in zip(("order", "masks"), self.windows.tables(self.bias.device), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *grid, C)``."""
        with autocast_off(x.device):
            grid = tuple(x.shape[1:-1])
            windows = self.windows if grid == self.grid else cut(grid, self.window, self.shifted)
            axes = tuple(range(1, 1 + len(grid)))
            missing = [p - g for g, p in zip(grid, windows.padded, strict=True)]
            x = pad(x.float(), (0, 0, *(side for m in missing[::-1] for side in (0, m))))
            x = x.roll([-s for s in windows.shift], axes)
            x = assemble(self._attend(partition(x, self.window), windows), self.window, windows.padded)
            return x.roll(windows.shift, axes)[(slice(None), *(slice(g) for g in grid))]

    def _attend(self, x: Tensor, windows: Windows) -> Tensor:
        """``(W, B, N, C)`` -> ``(W, B, N, C)``."""
        order, masks = (self.order, self.masks) if windows is self.windows else windows.tables(x.device)
        if order is not None:
            x = x[order]
        # (W, B, N, 3 C) -> three times (W, B, heads, N, C / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias[self.index].permute(2, 0, 1)
        counts = [len(numbers) for numbers in windows.groups.values()] or [len(x)]
        mixed, start = [], 0
        for group, count in enumerate(counts):
            parts = (t[start : start + count].flatten(0, 1) for t in (q, k, v))
            scores = bias if masks is None else bias.masked_fill(~masks[group], -torch.inf)
            mixed.append(scaled_dot_product_attention(*parts, attn_mask=scores[None]))
            start += count
        out = self.out(torch.cat(mixed).transpose(1, 2).reshape(x.shape))
        return out if order is None else out[order.argsort()]


class SwinBlock(nn.Module):
    """Eq. 1 of M4oE: ``z~ = (S)W-MSA(LN(z)) + z``, ``z' = FFN(LN(z~)) + z~``, with stochastic depth.

    Args:
        dim, heads, grid, window, shifted: see :class:`WindowAttention`.
        ffn: called as ``ffn(tokens, routing)``, for example :class:`~nnunet_diffext.networks.blocks.experts.MLP`.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn: nn.Module,
        *,
        grid: Sequence[int],
        window: Sequence[int],
        shifted: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, grid=grid, window=window, shifted=shifted)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor, routing: Routing | None = None) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *grid, C)``; ``routing`` is for the FFN."""
        z = z + self.drop_path(self.attention(self.norm1(z)))
        return z + self.drop_path(self.ffn(self.norm2(z), routing))
