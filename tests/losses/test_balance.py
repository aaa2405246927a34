"""Losses on gates: balance per layer, and the modality that the pooled gate tells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffext.losses.balance import balance_loss, modality_loss
from nnunet_diffext.networks.blocks.experts import Gate, ModalityExperts, Routing


def gate(probabilities: list[list[float]]) -> Gate:
    p = torch.tensor(probabilities)
    return Gate(p.log(), p)


def told(logits: Tensor) -> Gate:
    """As a layer with a gate per sample would."""
    log = logits.log_softmax(1)
    return Gate(log, log.detach().exp())


def test_balanced_is_one_and_a_single_expert_is_m() -> None:
    """The batch counts: every sample may be sure."""
    alike, sure = gate([[1 / 3] * 3] * 2), gate([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    collapsed = gate([[1.0, 0, 0]] * 2)
    assert balance_loss([alike]).item() == pytest.approx(1)
    assert balance_loss([sure]).item() == pytest.approx(1)
    assert balance_loss([collapsed]).item() == pytest.approx(3)


def test_layers_are_balanced_one_by_one() -> None:
    """Two layers with one expert each look balanced when they are pooled."""
    layers = [gate([[1.0, 0.0]]), gate([[0.0, 1.0]])]
    assert balance_loss(layers).item() == pytest.approx(2)


@pytest.mark.parametrize("top1", [False, True])
def test_descent_balances_the_gates(top1: bool) -> None:
    torch.manual_seed(0)
    layer, x = ModalityExperts(4, 4, 3, top1=top1), torch.randn(8, 50, 4)
    torch.nn.init.normal_(layer.gate.weight, std=2.0)
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([4.0, 0.0, -4.0]))
    optimiser = torch.optim.Adam(layer.gate.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        routing = Routing.free(8, 3)
        layer(x, routing)
        losses.append(balance_loss(routing.gates))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[0] > 1.2 and losses[-1] < 1.05
    load = routing.gates[0].load.mean(0)
    assert load.min() > 0.2, load


def test_modality_loss_is_the_cross_entropy_of_the_pooled_probabilities() -> None:
    logits, modality = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 1])
    pooled = logits.softmax(2).mean(0)
    gates = [told(layer) for layer in logits]
    wanted = -pooled[torch.arange(4), modality].log().mean()
    torch.testing.assert_close(modality_loss(gates, modality), wanted)
    two = pooled[:, :2] / pooled[:, :2].sum(1, keepdim=True)
    first = torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(modality_loss(gates, first, 2), -two[torch.arange(4), first].log().mean())


def test_finite_gradient_where_the_probability_underflows() -> None:
    """``log(mean(exp))`` of the obvious implementation is ``-inf`` there, and its gradient NaN."""
    layer, x = ModalityExperts(4, 4, 2), torch.ones(3, 5, 4)
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor([500.0, -500.0]))
    routing = Routing.free(3, 2)
    layer(x, routing)
    assert routing.gates[0].log_mean.exp()[:, 1].max() == 0
    loss = modality_loss(routing.gates, torch.ones(3, dtype=torch.long))
    assert loss.item() == pytest.approx(1000, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(layer.gate.bias.grad, torch.tensor([1.0, -1.0]))


def test_perfect_and_undecided_gates() -> None:
    modality = torch.tensor([0, 1])
    assert modality_loss([told(1e3 * torch.eye(2))], modality).item() == pytest.approx(0)
    assert modality_loss([told(torch.zeros(2, 4))], modality).item() == pytest.approx(math.log(4))


def test_without_any_gate() -> None:
    with pytest.raises(ValueError, match="No layer has a gate"):
        balance_loss([])
    with pytest.raises(ValueError, match="No layer has a gate"):
        modality_loss([], torch.tensor([0]))
