"""Swin networks of a few kilobytes, and plans whose grids no window divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tiny import KINDS, Kind, make_architecture
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.m4oe import M4oENet
from nnunet_diffext.networks.masked_autoencoder import M4oEAutoencoder

ODD = Kind((20, 28), ((1, 1), (2, 2), (2, 2)))
ODD_3D = Kind((5, 12, 20), ((1, 1, 1), (1, 2, 2), (1, 2, 2)))
PLANS = {name: KINDS[name] for name in ("2d", "3d", "3d-aniso", "3d-aniso-resenc", "2d-deep", "2d-shallow")}
PLANS |= {"odd": ODD, "odd-3d": ODD_3D}

SWIN: dict[str, Any] = {"embed_dim": 8, "window": 3, "drop_path": 0.0}
CT_AND_MR = {"CT": (True, True, False, True), "MR": (True, False, True, False)}
"""Two modalities, whose only common class is the background."""


def make_net(
    kind: str = "2d", modalities: Mapping[str, Sequence[bool]] = CT_AND_MR, *, regions: bool = False, **options: Any
) -> M4oENet:
    """A seeded network in eval mode whose gates are no longer zero."""
    torch.manual_seed(0)
    heads = len(next(iter(modalities.values())))
    plan, space = PLANS[kind], LabelSpace(heads, regions)
    net = M4oENet(make_architecture(plan), plan.patch, 1, space, modalities, **{**SWIN, **options})
    return learnt(net).eval()


def learnt(net: nn.Module, seed: int = 1) -> nn.Module:
    """As if trained: gates, norms and biases at random."""
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim < 2 or ".gate." in name:
            nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return net


def make_autoencoder(kind: str = "2d", experts: int = 2, channels: int = 1, **options: Any) -> M4oEAutoencoder:
    torch.manual_seed(0)
    plan = PLANS[kind]
    return M4oEAutoencoder(make_architecture(plan), plan.patch, channels, experts, **{**SWIN, **options})


def images(kind: str = "2d", batch: int = 3, channels: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, *PLANS[kind].patch, generator=torch.Generator().manual_seed(seed))
