"""From voxels to tokens, and between the resolutions of a Swin U-Net. Tokens are channels-last: ``(B, *grid, C)``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_diffext.networks.blocks.linear import linear


def split(x: Tensor, size: Sequence[int]) -> Tensor:
    """Every axis into blocks: ``(B, *grid, C)`` -> ``(B, *(grid / size), *size, C)``."""
    for axis, length in enumerate(size):
        x = x.unflatten(1 + 2 * axis, (-1, length))
    blocks, inside = range(1, 2 * len(size), 2), range(2, 2 * len(size) + 1, 2)
    return x.permute(0, *blocks, *inside, -1)


def to_channels(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Neighbours as channels: ``(B, *grid, C)`` -> ``(B, *(grid / stride), prod(stride) C)``."""
    return split(x, stride).flatten(1 + len(stride))


def to_grid(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Inverse of :func:`to_channels`."""
    axes = len(stride)
    x = x.unflatten(-1, (*stride, -1))
    pairs = [dim for axis in range(axes) for dim in (1 + axis, 1 + axes + axis)]
    x = x.permute(0, *pairs, -1)
    for axis in range(axes):
        x = x.flatten(1 + axis, 2 + axis)
    return x


def grid_of(image: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """Tokens per axis of images ``(B, C, *patch)``.

    Raises:
        ValueError: the stride does not divide the image.
    """
    size, stride = tuple(image.shape[2:]), tuple(stride)
    if any(p % s for p, s in zip(size, stride, strict=True)):
        raise ValueError(f"An image of {size} voxels cannot be cut into tokens of {stride} voxels.")
    return tuple(p // s for p, s in zip(size, stride, strict=True))


class PatchEmbedding(nn.Module):
    """A strided convolution whose kernels do not overlap, then layer norm.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: of what is embedded.
        dim: channels of a token.
        stride: voxels per token, for every axis.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, dim: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.project = conv_op(channels, dim, self.stride, self.stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *patch)`` -> ``(B, *grid, dim)``.

        Raises:
            ValueError: the stride does not divide the image.
        """
        grid_of(image, self.stride)
        return self.norm(self.project(image).movedim(1, -1))


class PatchMerging(nn.Module):
    """To the next coarser level: neighbours concatenated, layer norm, linear to twice the channels.

    Args:
        dim: channels.
        stride: tokens that become one, for every axis.
    """

    def __init__(self, dim: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.norm = nn.LayerNorm(math.prod(stride) * dim)
        self.reduce = linear(math.prod(stride) * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *(grid / stride), 2 C)``."""
        return self.reduce(self.norm(to_channels(x, self.stride)))


class PatchExpanding(nn.Module):
    """To a finer level: linear, channels spread over the new tokens, layer norm.

    Args:
        dim: channels.
        stride: tokens that one becomes, for every axis.
        out: channels of the finer level.
    """

    def __init__(self, dim: int, stride: Sequence[int], out: int) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.expand = linear(dim, math.prod(stride) * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, *(grid stride), out)``."""
        return self.norm(to_grid(self.expand(x), self.stride))
