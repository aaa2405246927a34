"""One projection for all labels (unionHead), against one per modality."""

from __future__ import annotations

import pytest
import torch
from test_m4oe_growth import LARGER, NEW_LABEL, OLD, grow, same
from tiny_swin import CT_AND_MR, images, make_net

from nnunet_diffext.networks.m4oe_transfer import freeze_all_but

MODALITY = torch.tensor([0, 1, 0])


def test_modalities_share_the_rows_of_their_labels() -> None:
    own, shared = make_net(), make_net(shared_head=True)
    assert len(own.head.seg_layers) == 2 and len(shared.head.seg_layers) == 1
    layer = shared.head.seg_layers[0]
    assert layer.weight.shape[0] == 4
    tokens = torch.randn(3, 5, 6, layer.in_features)
    logits, every = shared.head(tokens, MODALITY), layer(tokens).movedim(-1, 1)
    for sample, m in enumerate(MODALITY.tolist()):
        classes = shared.head.classes[m]
        others = [k for k in range(4) if k not in classes]
        torch.testing.assert_close(logits[sample, classes], every[sample, classes])
        assert logits[sample].softmax(0)[others].max() == 0, list(CT_AND_MR)[m]


def test_labels_that_a_sample_does_not_have_get_no_gradient() -> None:
    net = make_net(shared_head=True).train()
    net(images(), modality=torch.ones(3, dtype=torch.long)).logits.softmax(1)[:, 2].sum().backward()
    moved = net.head.seg_layers[0].weight.grad.abs().amax(1) > 0
    assert moved.tolist() == [True, False, True, False]


@pytest.mark.parametrize("larger", LARGER)
@torch.no_grad()
def test_one_modality_more(larger: dict[str, tuple[bool, ...]]) -> None:
    """For the old ones, other rows do not decide how theirs are rounded."""
    old, new = grow(larger, shared_head=True)
    new.activate("US")
    assert new.head.seg_layers[0].weight.shape[0] == len(larger["US"])
    for m in range(len(OLD)):
        old.modality = new.modality = m
        assert same(new(images()), old(images()))


@pytest.mark.parametrize("larger", LARGER)
def test_only_new_labels_are_trained(larger: dict[str, tuple[bool, ...]]) -> None:
    _, new = grow(larger, shared_head=True)
    new.activate("US")
    freeze_all_but(new, 2)
    new.train()(images(), modality=torch.full((3,), 2)).logits.softmax(1)[:, 1].sum().backward()
    gradient = new.head.seg_layers[0].weight.grad
    if larger is NEW_LABEL:
        assert (gradient.abs().amax(1) > 0).tolist() == [False, False, False, True]
    else:
        assert gradient is None, "US has no label of its own"
