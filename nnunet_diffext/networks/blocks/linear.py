"""Linear layers as masked autoencoders start them."""

from __future__ import annotations

from torch import nn

STD = 0.02
"""Standard deviation of new position biases and of layers that begin with little (Dosovitskiy et al. 2021)."""


def linear(channels: int, out: int, *, bias: bool = True) -> nn.Linear:
    """``nn.Linear`` with Glorot's uniform weights (He et al. 2022, appendix A) and zero bias.

    A standard deviation of 0.02 is right for the widths of large transformers. With the tens of channels that 3D leaves
    room for, every block would begin as the identity, and attention as a mean over the window.
    """
    layer = nn.Linear(channels, out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
