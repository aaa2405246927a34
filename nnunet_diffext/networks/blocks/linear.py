"""Linear layers as transformers start them."""

from __future__ import annotations

from torch import nn

STD = 0.02
"""Standard deviation of new weights (Dosovitskiy et al. 2021)."""


def linear(channels: int, out: int, *, bias: bool = True) -> nn.Linear:
    """``nn.Linear`` with weights from a truncated normal distribution and zero bias."""
    layer = nn.Linear(channels, out, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
