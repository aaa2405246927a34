"""The table of costs in docs/m4oe.md, counted without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Kind, make_architecture
from torch.utils.flop_counter import FlopCounterMode

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.m4oe import M4oENet

FLAT = Kind((224, 224), ((1, 1), *((2, 2),) * 5), features=(32,) * 6)
VOLUME = Kind((128, 128, 128), ((1, 1, 1), *((2, 2, 2),) * 5), features=(32,) * 6)


def cost(kind: Kind, channels: int, modalities: int, known: bool = False, **options: Any) -> tuple[float, float]:
    """Million parameters and billion multiply-adds of one prediction, with nine classes in every modality."""
    names = {str(m): (True,) * 9 for m in range(modalities)}
    with torch.device("meta"):
        net = M4oENet(make_architecture(kind), kind.patch, channels, LabelSpace(9), names, **options).eval()
        image = torch.empty(1, channels, *kind.patch)
        modality = torch.zeros(1, dtype=torch.long) if known else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image, modality=modality)
    return sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("modalities", "options", "parameters", "operations"),
    [
        (1, {"where": "none"}, 27.17, 6.11),
        (3, {}, 58.49, 12.67),
        (3, {"gate": "channel"}, 60.43, 13.08),
        (3, {"gate": "none", "known": True}, 58.47, 6.20),
        (4, {}, 58.49 + 15.66, 12.67 + 3.28),
        (3, {"stem": True, "tells": True}, 58.49, 14.34),
    ],
)
def test_at_the_papers_size(modalities: int, options: dict[str, Any], parameters: float, operations: float) -> None:
    assert cost(FLAT, 3, modalities, **{"stem": False, "tells": False, **options}) == pytest.approx(
        (parameters, operations), abs=0.01
    )


@pytest.mark.parametrize(
    ("modalities", "options", "parameters", "operations"),
    [
        (1, {"where": "none", "stem": False}, 8.00, 129.9),
        (3, {"stem": False, "tells": False}, 15.84, 200.9),
        (1, {"where": "none"}, 8.07, 264.0),
        (3, {}, 15.98, 335.8),
    ],
)
def test_in_3d(modalities: int, options: dict[str, Any], parameters: float, operations: float) -> None:
    assert cost(VOLUME, 1, modalities, **options) == pytest.approx((parameters, operations), abs=0.05)
