"""Every variant trains: one step reaches every parameter, which DDP requires, and none is dead without a reason."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from tiny import make_batch, ready_trainer
from torch import nn

# Table 2, and the switches that document what the paper leaves open
ROWS = [
    "", "CEonly", "DEonly", "fixedAverage", "noCACL", "noCACL_IEFA", "IEFA", "halfDE", "featuresOnly", "eq4",
    "TOnly", "leaky", "recycle", "paper", "threshold0p5", "iefaUncertain", "noEMA", "noCopyPaste", "oneDirection",
    "noStrong", "halfDE_fixedAverage", "coupled", "halfDE_coupled",
]  # fmt: skip
# nothing but a weight of zero stands between these heads and a gradient
WITHOUT_WEIGHT = {
    "featuresOnly_eq4": {"ce.seg_layers.0.weight", "ce.seg_layers.0.bias"},
    "featuresOnly_eq4_TOnly": {f"{e}.seg_layers.0.{p}" for e in ("de", "ce") for p in ("weight", "bias")},
    "fixedAverage_eq4": set(),
}


def without_effect(net: nn.Module) -> set[str]:
    """Parameters that cannot change the output: a bias that the instance norm behind it removes."""
    return {f"{name}.conv.bias" for name, m in net.named_modules() if isinstance(m, ConvDropoutNormReLU)}


def gradients(tokens: str, kind: str, steps: int, unlabeled: bool = True) -> tuple[nn.Module, dict[str, float]]:
    """Largest gradient of every parameter in the last of a few training steps."""
    trainer = ready_trainer(tokens, kind)
    for step in range(steps):
        report = trainer.train_step(make_batch(trainer, unlabeled=unlabeled, seed=step))
    assert torch.isfinite(torch.tensor(float(report["loss"])))
    missing = [name for name, p in trainer.network.named_parameters() if p.grad is None]
    assert missing == [], "DDP refuses parameters that no loss reaches"
    return trainer.network, {name: float(p.grad.abs().max()) for name, p in trainer.network.named_parameters()}


def dead(net: nn.Module, largest: dict[str, float], floor: float) -> set[str]:
    return {name for name, g in largest.items() if g < floor} - without_effect(net)


@pytest.mark.parametrize("tokens", ROWS)
def test_one_step_reaches_every_parameter(tokens: str) -> None:
    net, largest = gradients(tokens, "2d", steps=1)
    assert dead(net, largest, 1e-6) == set()


@pytest.mark.parametrize("tokens", ["", "halfDE", "DEonly", "CEonly"])
@pytest.mark.parametrize("kind", ["3d-aniso", "3d-aniso-resenc"])
def test_in_3d(kind: str, tokens: str) -> None:
    """The last norm of a residual block starts at zero, so its convolutions learn from the second step on."""
    net, largest = gradients(tokens, kind, steps=3)
    assert dead(net, largest, 1e-7) == set()


@pytest.mark.parametrize("tokens", ["", "IEFA", "DEonly", "paper"])
def test_without_unlabelled_images(tokens: str) -> None:
    net, largest = gradients(tokens, "2d", steps=1, unlabeled=False)
    assert dead(net, largest, 1e-6) == set()


@pytest.mark.parametrize("tokens", WITHOUT_WEIGHT)
def test_zero_only_where_the_weight_is_zero(tokens: str) -> None:
    net, largest = gradients(tokens, "2d", steps=1)
    assert {name for name, g in largest.items() if g == 0} - without_effect(net) == WITHOUT_WEIGHT[tokens]
    assert dead(net, largest, 1e-6) == WITHOUT_WEIGHT[tokens]


def test_parameters_called_without_effect_have_none() -> None:
    """The exception above is a statement about the network, so it is checked: shifting them changes nothing."""
    trainer = ready_trainer()
    net = trainer.network.eval()
    image = make_batch(trainer)["data"]
    with torch.no_grad():
        reference = net(image)
        for name, p in net.named_parameters():
            if name in without_effect(net):
                p.add_(1.0)
        torch.testing.assert_close(net(image), reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "reached"), [("", False), ("halfDE", False), ("coupled", True), ("eq4", True)])
def test_whether_the_fused_loss_reaches_the_experts(tokens: str, reached: bool) -> None:
    """By default it trains the fusion alone; the experts have losses of their own."""
    trainer = ready_trainer(tokens)
    trainer.compute_losses(make_batch(trainer))["sup"].backward()
    touched = {name.split(".")[0] for name, p in trainer.network.named_parameters() if p.grad is not None}
    assert {"fusion"} <= touched and ({"de", "ce"} <= touched) == reached
    assert reached or touched <= {"fusion", "lift_de"}
