"""PGRD's network around a random prior, small, and what goes into it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import KINDS, Kind, make_architecture
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.pgrd import PGRDNet

SMALL = Kind((8, 16, 16), ((1, 1, 1), (1, 2, 2)), features=(8, 16))
FLAT = Kind((16, 16), ((1, 1), (2, 2)), features=(8, 16))


def make_net(
    plan: str | Kind = FLAT, *, heads: int = 2, channels: int = 1, regions: bool = False, prior: bool = True, **kw: Any
) -> PGRDNet:
    """A seeded network around a random prior."""
    torch.manual_seed(0)
    architecture = make_architecture(plan)
    network = architecture.build(channels, heads) if prior else None
    return PGRDNet(network, architecture, channels, LabelSpace(heads, regions), **kw)


def shaken(net: PGRDNet) -> PGRDNet:
    """As after some training: the heads are not at zero."""
    generator = torch.Generator().manual_seed(5)
    for layer in net.heads.seg_layers if net.heads is not None else ():
        layer.weight.data.normal_(0, 0.3, generator=generator)
    return net


def image_of(kind: str | Kind = FLAT, batch: int = 2, channels: int = 1, seed: int = 1) -> Tensor:
    patch = (KINDS[kind] if isinstance(kind, str) else kind).patch
    return torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(seed))


def onehot_of(kind: str | Kind = FLAT, batch: int = 2, heads: int = 2) -> Tensor:
    labels = image_of(kind, batch, heads, 2).argmax(1)
    return nn.functional.one_hot(labels, heads).movedim(-1, 1).float().contiguous()


def noise_of(net: PGRDNet, image: Tensor, seed: int = 3) -> Tensor:
    shape = (len(image), net.label_space.num_heads, *image.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
