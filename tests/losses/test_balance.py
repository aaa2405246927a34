"""Loss on the experts' gates: balance per layer."""

from __future__ import annotations

import pytest
import torch

from nnunet_diffext.losses.balance import balance_loss
from nnunet_diffext.networks.blocks.experts import Gate, ModalityExperts, Routing


def gate(probabilities: list[list[float]]) -> Gate:
    p = torch.tensor(probabilities)
    return Gate(p, p)


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


def test_without_any_gate() -> None:
    with pytest.raises(ValueError, match="No layer has a gate"):
        balance_loss([])
