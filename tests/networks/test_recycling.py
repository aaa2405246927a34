"""Label leaks in the latent space: what the denoiser sees in training, from the labels or from its own guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_latent import FLAT, SMALL, Oracle, image_of, make_leaf, make_text, onehot_of
from torch import nn

NETS = {"LEAF": (make_leaf, "unet"), "TextDiffSeg": (make_text, "denoiser")}


def predictions(net: nn.Module, kind: Any, recycle: bool) -> list[torch.Tensor]:
    """Of the same images and noise, for two different masks."""
    found = []
    for seed in (2, 3):
        torch.manual_seed(0)
        found.append(net(image_of(kind), clean=onehot_of(kind, seed=seed), recycle=recycle).prediction)
    return found


@pytest.mark.parametrize("kind", [FLAT, SMALL])
@pytest.mark.parametrize("method", NETS)
def test_labels_reach_the_denoiser_unless_it_recycles(method: str, kind: Any) -> None:
    make, _ = NETS[method]
    net = make(kind, terminal_share=0.0).train()
    leaking, recycled = (predictions(net, kind, recycle) for recycle in (False, True))
    assert not torch.equal(*leaking)
    assert torch.equal(*recycled)


@pytest.mark.parametrize("method", NETS)
def test_first_guess_is_made_at_the_end_of_the_schedule_and_not_trained(method: str) -> None:
    """Two evaluations per step; the gradient passes through the second alone."""
    make, name = NETS[method]
    net = make(FLAT, terminal_share=0.0).train()
    seen: list[tuple[torch.Tensor, bool]] = []
    net.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append((args[2], out.logits.requires_grad)))
    net(image_of(), clean=onehot_of(), recycle=True)
    (first, graph), (second, trained) = seen
    assert (first == net.schedule.timesteps - 1).all() and not graph
    assert (second < net.schedule.timesteps - 1).any() and trained


def test_perfect_guess_is_the_labels_latent() -> None:
    """With a denoiser that knows the answer, recycling changes nothing: same distribution of what is seen."""
    net = make_leaf(FLAT).train()
    z0 = net.encode_masks(onehot_of())
    net.unet = Oracle("x0", net.schedule, z0)
    torch.testing.assert_close(net.first_guess(net.known(image_of()), torch.zeros_like(z0)), z0)
