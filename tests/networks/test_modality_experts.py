"""The experts of a layer and their gates (M4oE eq. 2 and 3; METHODS 4.5-1 and 4.5-3)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from nnunet_diffext.networks.blocks.experts import GATES, MLP, WEIGHING, ModalityExperts, Routing, log_softmax

DIM, HIDDEN, M = 6, 10, 3


def make(gate: str = "token", experts: int = M, *, top1: bool = False, trained: bool = True) -> ModalityExperts:
    """With gates that have learnt something, unless they shall be fresh."""
    torch.manual_seed(0)
    module = ModalityExperts(DIM, HIDDEN, experts, gate=gate, top1=top1)
    for p in module.parameters() if trained else ():
        nn.init.normal_(p, std=0.7)
    return module


def tokens(batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 5, DIM, generator=torch.Generator().manual_seed(seed))


def free(batch: int = 4, experts: int = M, modality: Tensor | None = None) -> Routing:
    return Routing.free(batch, experts, modality)


def alone(module: ModalityExperts, m: int) -> MLP:
    """Expert m as an ordinary MLP."""
    mlp = MLP(DIM, HIDDEN)
    with torch.no_grad():
        for layer, weight, bias in ((mlp.into, "weight_in", "bias_in"), (mlp.out, "weight_out", "bias_out")):
            layer.weight.copy_(getattr(module, weight)[m].T)
            layer.bias.copy_(getattr(module, bias)[m])
    return mlp


def permuted(module: ModalityExperts, order: list[int]) -> ModalityExperts:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name in (*module.stacked, "gate.weight", "gate.bias"):
            other.get_parameter(name).copy_(module.get_parameter(name)[order])
    return other


def grown(module: ModalityExperts) -> ModalityExperts:
    """One more expert behind the others."""
    other = make(module.kind, module.experts + 1, top1=module.top1)
    with torch.no_grad():
        names = [*module.stacked, *(["gate.weight", "gate.bias"] if module.weighs else [])]
        for name in names:
            other.get_parameter(name)[: module.experts] = module.get_parameter(name)
        if module.kind == "channel":
            other.gate.load_state_dict(module.gate.state_dict())
    return other


# ------------------------------------------------------------------ the gate
@pytest.mark.parametrize("gate", WEIGHING)
def test_gate_is_a_softmax_over_experts(gate: str) -> None:
    """Written out: ``sum_i softmax(W_g x + b_g)_i expert_i(x)``."""
    module, x, routing = make(gate), tokens(), free()
    seen = x if gate == "token" else x.mean((1, 2), keepdim=True)
    weights = (seen @ module.gate.weight.T + module.gate.bias).softmax(-1)
    assert weights.shape[-1] == M and module.gate.weight.shape == (M, DIM)
    wanted = sum(weights[..., m, None] * alone(module, m)(x) for m in range(M))
    torch.testing.assert_close(module(x, routing), wanted, atol=1e-5, rtol=1e-5)
    (record,) = routing.gates
    mean = weights.expand(*x.shape[:-1], M).mean((1, 2))
    torch.testing.assert_close(record.mean, mean)
    torch.testing.assert_close(record.load, mean)
    torch.testing.assert_close(record.mean.sum(1), torch.ones(4))
    assert record.mean.dtype == torch.float32 and record.mean.requires_grad and not record.load.requires_grad


@pytest.mark.parametrize("gate", WEIGHING)
def test_fresh_gate_is_uniform(gate: str) -> None:
    module, x = make(gate, trained=False), tokens()
    wanted = sum(alone(module, m)(x) for m in range(M)) / M
    torch.testing.assert_close(module(x, free()), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top1", [False, True])
@pytest.mark.parametrize("gate", WEIGHING)
def test_infinite_logit_is_that_expert_alone(gate: str, top1: bool) -> None:
    module, x = make(gate, top1=top1), tokens()
    with torch.no_grad():
        module.gate.bias[1] = 1e30
    torch.testing.assert_close(module(x, free()), alone(module, 1)(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gate", WEIGHING)
def test_order_of_the_experts_does_not_matter(gate: str) -> None:
    module, x = make(gate), tokens()
    shuffled = permuted(module, [2, 0, 1])
    torch.testing.assert_close(shuffled(x, free()), module(x, free()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gate", WEIGHING)
def test_experts_that_are_not_allowed(gate: str) -> None:
    """They have no say, and get no gradient."""
    module, x = make(gate), tokens()
    allowed = torch.tensor([[True, False, True]]).expand(4, -1)
    routing = free()._replace(allowed=allowed)
    out = module(x, routing)
    with torch.no_grad():
        module.gate.bias[1] = -1e30
    torch.testing.assert_close(out, module(x, free()), atol=1e-6, rtol=1e-5)
    out.sum().backward()
    assert module.weight_in.grad[1].abs().max() == 0 and module.weight_in.grad[0].abs().max() > 0
    assert module.gate.weight.grad[1].abs().max() == 0
    assert routing.gates[0].load[:, 1].abs().max() == routing.gates[0].mean[:, 1].abs().max() == 0


def test_gate_of_the_authors_code() -> None:
    """It weighs channels, all experts alike, and nearly switches the branch off."""
    module, x, routing = make("channel"), tokens(), free()
    everyone = sum(alone(module, m)(x) for m in range(M))
    weights = (x @ module.gate.weight.T + module.gate.bias).softmax(-1)
    torch.testing.assert_close(module(x, routing), weights * everyone, atol=1e-5, rtol=1e-5)
    assert routing.gates == [] and module.gate.weight.shape == (DIM, DIM)
    fresh = make("channel", trained=False)
    wide = fresh(x, free()).abs().mean() / sum(alone(fresh, m)(x) for m in range(M)).abs().mean()
    assert abs(wide * DIM - 1) < 0.1


def test_log_softmax() -> None:
    logits = torch.tensor([[3.0, -200.0], [-2.0, 900.0], [0.5, 1e30]])
    torch.testing.assert_close(torch.stack(log_softmax(logits.unbind(0))), logits.log_softmax(0))


# ------------------------------------------------------------------ one expert only
@pytest.mark.parametrize("gate", WEIGHING)
def test_top1_costs_one_expert_at_prediction_and_says_the_same(gate: str) -> None:
    module, x = make(gate, top1=True), tokens()
    module.train()
    dense = module(x, free())
    rows: list[int] = []
    one = ModalityExperts._expert
    module._expert = lambda m, x: (rows.append(x.shape[:-1].numel()), one(module, m, x))[1]
    sparse = module.eval()(x, free())
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    assert sum(rows) == (x[..., 0].numel() if gate == "token" else 0), "otherwise one product per sample"
    assert (rows or gate == "sample") and 0 not in rows, "more than one expert is chosen"


@pytest.mark.parametrize("gate", WEIGHING)
def test_top1_is_scaled_by_its_probability_and_trains_the_gate(gate: str) -> None:
    module, x, routing = make(gate, top1=True), tokens(), free()
    out = module(x, routing)
    seen = x if gate == "token" else x.mean((1, 2), keepdim=True)
    best, choice = (seen @ module.gate.weight.T + module.gate.bias).softmax(-1).max(-1, keepdim=True)
    every = torch.stack([alone(module, m)(x) for m in range(M)])
    wanted = best * torch.take_along_dim(every, choice.expand(*x.shape[:-1], 1).unsqueeze(0), 0)[0]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    shares = nn.functional.one_hot(choice[..., 0], M).float().mean((1, 2))
    torch.testing.assert_close(routing.gates[0].load, shares)
    out.sum().backward()
    assert module.gate.weight.grad.abs().max() > 0 and all(p.grad is not None for p in module.parameters())


def test_hard_routing_is_the_expert_of_the_modality() -> None:
    module, x, modality = make("none"), tokens(), torch.tensor([2, 0, 2, 1])
    routing = free(modality=modality)
    wanted = torch.stack([alone(module, int(m))(sample) for m, sample in zip(modality, x, strict=True)])
    torch.testing.assert_close(module(x, routing), wanted, atol=1e-6, rtol=1e-5)
    assert routing.gates == [] and module.gate is None


def test_hard_routing_isolates_the_experts() -> None:
    """METHODS 4.5-3: the others get a gradient (DDP demands one), of exactly zero."""
    module, shared = make("none"), nn.Linear(DIM, DIM)
    module(shared(tokens()), free(modality=torch.full((4,), 1))).square().sum().backward()
    for name in module.stacked:
        gradient = module.get_parameter(name).grad
        assert gradient[1].abs().min() > 0 and torch.equal(gradient[[0, 2]], torch.zeros_like(gradient[[0, 2]]))
    assert shared.weight.grad.abs().min() > 0


def test_hard_routing_of_an_unknown_modality_is_uniform_over_what_is_allowed() -> None:
    module, x = make("none"), tokens()
    routing = free()._replace(allowed=torch.tensor([[True, True, False]]).expand(4, -1))
    wanted = (alone(module, 0)(x) + alone(module, 1)(x)) / 2
    torch.testing.assert_close(module(x, routing), wanted, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------ one more expert
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
@pytest.mark.parametrize(("gate", "top1"), [(g, False) for g in GATES] + [(g, True) for g in WEIGHING])
def test_one_more_expert_of_weight_zero_changes_no_bit(gate: str, top1: bool, experts: int) -> None:
    module, x = make(gate, experts, top1=top1).eval(), tokens(seed=experts)
    more = grown(module).eval()
    allowed = (torch.arange(experts + 1) < experts).expand(4, -1)
    routing = free(experts=experts + 1)._replace(allowed=allowed)
    before = free(experts=experts)
    assert torch.equal(more(x, routing), module(x, before))
    for old, new in zip(before.gates, routing.gates, strict=True):
        assert torch.equal(new.mean[:, :experts], old.mean) and new.mean[:, experts].abs().max() == 0
    if not top1 and gate in ("token", "none"):
        assert not torch.equal(more(x, free(experts=experts + 1)), module(x, before)), "the new one matters if allowed"


# ------------------------------------------------------------------ other
@pytest.mark.parametrize("gate", GATES)
def test_half_precision(gate: str) -> None:
    """The gate stays in float32: its logits must not be rounded to three digits."""
    module, x = make(gate), tokens()
    wanted = module(x, free(modality=torch.zeros(4, dtype=torch.long)))
    routing = free(modality=torch.zeros(4, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, routing)
    torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.1)
    reference = free()
    module(x, reference)
    for half, full in zip(routing.gates, reference.gates, strict=True):
        assert torch.equal(half.mean, full.mean)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="Unknown gate 'tokens'; choose one of token, sample, channel, none"):
        make("tokens")
    for gate in ("channel", "none"):
        with pytest.raises(ValueError, match=f"top1 needs probabilities .* the gate '{gate}' does not have"):
            make(gate, top1=True)


def test_pickles() -> None:
    module, x = make(), tokens()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, free()), module(x, free()))
