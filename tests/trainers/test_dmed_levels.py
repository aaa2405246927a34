"""Deep supervision of DMED-Seg's experts: in training only, at nnU-Net's levels, into the experts' own losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import KINDS, make_batch, make_net, ready_trainer
from torch import Tensor

DEEP = "2d-deep"


def train_output(tokens: dict[str, Any], kind: str = DEEP) -> Any:
    net = make_net(kind, **{"deep_supervision": True, **tokens}).train()
    return net(torch.randn(2, 1, *KINDS[kind].patch))


@pytest.mark.parametrize("experts", ["both", "de", "ce"])
def test_levels_are_those_of_nnunet(experts: str) -> None:
    """Six stages: five resolutions of the decoder, all supervised but the coarsest."""
    out = train_output({"experts": experts})
    for name, levels in (("de", out.de_levels), ("ce", out.ce_levels)):
        sizes = [tuple(level.shape[2:]) for level in levels]
        assert sizes == ([(64, 64), (32, 32), (16, 16), (8, 8)] if experts in ("both", name) else [])
    assert train_output({"experts": "ce", "deep_supervision": False}).ce_levels[0].shape[2:] == (64, 64)
    assert len(train_output({"experts": "ce", "deep_supervision": False}).ce_levels) == 1


def test_prediction_does_not_depend_on_the_coarse_heads() -> None:
    net = make_net(DEEP, deep_supervision=True).eval()
    image = torch.randn(1, 1, *KINDS[DEEP].patch)
    before = net(image)
    for expert in (net.de, net.ce):
        for head in expert.seg_layers[1:]:
            torch.nn.init.constant_(head.weight, 9.0)
    assert torch.equal(net(image), before)


def losses_with(trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return trainer.compute_losses(batch)


@pytest.mark.parametrize(("tokens", "term"), [("", "sup_experts"), ("CEonly", "sup"), ("DEonly", "cac")])
def test_coarse_heads_enter_the_experts_losses(tokens: str, term: str) -> None:
    """And only these: the fused prediction has one resolution."""
    trainer = ready_trainer("_".join(filter(None, [tokens, "DS"])), DEEP)
    batch = make_batch(trainer)
    trainer.start_teacher()
    before = losses_with(trainer, batch)
    for expert in (trainer.network.de, trainer.network.ce):
        for head in [] if expert is None else expert.seg_layers[1:]:
            torch.nn.init.normal_(head.weight, std=3.0)
    after = losses_with(trainer, batch)
    assert after[term] != before[term]
    unchanged = {"": {"sup", "cac", "diffusion"}, "CEonly": set(), "DEonly": {"diffusion"}}[tokens]
    assert all(after[k] == before[k] for k in unchanged)


def test_half_resolution_expert_is_supervised_below_its_own() -> None:
    out = train_output({"full_resolution_de": False})
    assert [tuple(level.shape[2:]) for level in out.de_levels] == [(64, 64), (16, 16), (8, 8)]
