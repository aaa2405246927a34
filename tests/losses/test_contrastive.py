"""InfoNCE between the experts' features (DMED-Seg eq. 3, with the positive pair in the denominator)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffext.losses.contrastive import inter_expert_alignment

TAU = 0.1


def orthogonal(batch: int, side: int) -> Tensor:
    """``(B, B side^2, side, side)``: every location of the batch has its own axis."""
    n = batch * side * side
    return torch.eye(n).view(batch, side * side, n).transpose(1, 2).reshape(batch, n, side, side)


def literal_eq3(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """Eq. 3 as printed, mean over locations: the denominator runs over the negatives only."""
    a, b = (torch.nn.functional.normalize(f.flatten(2).transpose(1, 2).flatten(0, 1), dim=1) for f in (a, b))
    similarity = a @ b.T / tau
    negatives = similarity.masked_fill(torch.eye(len(a), dtype=torch.bool), -math.inf)
    return -(similarity.diagonal() - negatives.logsumexp(1)).mean()


def test_perfect_alignment_reaches_the_closed_form() -> None:
    features = orthogonal(2, 3)
    others = 2 * 3 * 3 - 1
    expected = math.log(1 + others * math.exp(-1 / TAU))
    assert 0 <= inter_expert_alignment(features, features, temperature=TAU).item() <= expected * 1.01
    # at a higher temperature the value is large enough to be compared digit by digit
    loss = inter_expert_alignment(features, features, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + others / math.e), abs=1e-5)


def test_wrong_pairing_costs() -> None:
    """Cyclic shift: every location is paired with an orthogonal one, and its partner sits among the negatives."""
    features = orthogonal(2, 3)
    shifted = features.flatten(2).roll(1, dims=-1).view_as(features)
    aligned = inter_expert_alignment(features, features, temperature=TAU).item()
    assert inter_expert_alignment(features, shifted, temperature=TAU).item() > aligned + 0.9 / TAU
    assert inter_expert_alignment(features, features.flip(0), temperature=TAU).item() > aligned + 0.9 / TAU


def test_negatives_come_from_other_samples_too() -> None:
    """One location per sample: without the other samples there would be no negatives and the loss would be zero."""
    features = torch.ones(4, 2, 1, 1)
    assert inter_expert_alignment(features, features, temperature=TAU).item() == pytest.approx(math.log(4), abs=1e-5)


def test_bounded_below_where_the_literal_equation_is_not() -> None:
    """Two locations, opposite to each other: eq. 3 as printed is -2 / tau, without a floor as tau shrinks."""
    features = torch.tensor([[[1.0, -1.0]]])[..., None]
    assert literal_eq3(features, features, TAU).item() == pytest.approx(-2 / TAU, abs=1e-4)
    assert literal_eq3(features, features, TAU / 100).item() == pytest.approx(-200 / TAU, rel=1e-4)
    assert inter_expert_alignment(features, features, temperature=TAU).item() >= 0
    assert inter_expert_alignment(features, features, temperature=TAU / 100).item() >= 0


def test_optimised_features_stay_above_zero() -> None:
    """An adversary that minimises either loss: the literal one falls far below zero, ours ends at zero or above."""

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return inter_expert_alignment(a, b, temperature=TAU)

    def literal(a: Tensor, b: Tensor) -> Tensor:
        return literal_eq3(a, b, TAU)

    generator = torch.Generator().manual_seed(0)
    lowest = {}
    for loss_function in (ours, literal):
        features = torch.randn(2, 1, 8, 3, 1, generator=generator, requires_grad=True)
        values = []
        for _ in range(100):
            loss = loss_function(*features)
            (gradient,) = torch.autograd.grad(loss, features)
            features = (features - 0.3 * gradient).detach().requires_grad_()
            values.append(loss.item())
        lowest[loss_function] = min(values)
    assert 0 <= lowest[ours] < 0.1
    assert lowest[literal] < -5


@pytest.mark.parametrize("shape", [(2, 8, 3, 4), (2, 8, 2, 3, 2)])
def test_symmetric_and_indifferent_to_scale(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape), torch.randn(shape)
    loss = inter_expert_alignment(a, b)
    assert inter_expert_alignment(b, a).item() == pytest.approx(loss.item(), abs=1e-6)
    assert inter_expert_alignment(7 * a, b / 3).item() == pytest.approx(loss.item(), abs=1e-5)


def test_weight_selects_locations() -> None:
    """Only the left half is misaligned; a weight on either half sees what is there, whatever its scale."""
    features = orthogonal(1, 4)
    other = features.clone()
    other[..., :2] = features[..., :2].flip(2)
    left, right = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    left[..., :2], right[..., 2:] = 1, 0.25
    assert inter_expert_alignment(features, other, weight=left).item() > 9
    assert inter_expert_alignment(features, other, weight=right).item() < 0.01
    uniform = inter_expert_alignment(features, other, weight=torch.full((1, 1, 4, 4), 0.5))
    assert uniform.item() == pytest.approx(inter_expert_alignment(features, other).item(), abs=1e-5)
    assert inter_expert_alignment(features, other, weight=torch.zeros(1, 1, 4, 4)).item() == 0


def test_number_of_locations_is_limited() -> None:
    """With constant features the loss is the log of how many locations take part."""
    features = torch.ones(2, 4, 10, 10)
    loss = inter_expert_alignment(features, features, max_locations=32)
    assert loss.item() == pytest.approx(math.log(32), abs=1e-5)
    assert inter_expert_alignment(features, features).item() == pytest.approx(math.log(200), abs=1e-5)
    large = torch.ones(1, 1, 33, 33)
    assert inter_expert_alignment(large, large).item() == pytest.approx(math.log(1024), abs=1e-4)


def test_both_experts_are_pulled() -> None:
    a, b = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 4, 3, 3, requires_grad=True)
    inter_expert_alignment(a, b).backward()
    assert a.grad.abs().min() > 0 and b.grad.abs().min() > 0


def test_dead_features_are_finite() -> None:
    a, b = torch.zeros(1, 4, 3, 3, requires_grad=True), torch.zeros(1, 4, 3, 3, requires_grad=True)
    loss = inter_expert_alignment(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(9), abs=1e-5)
    assert torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()
