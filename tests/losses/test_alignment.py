"""Feature alignment (LEAF eq. 5): a mean per token, of slices that show the same place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_diffext.losses.alignment import axial_slices, feature_alignment
from nnunet_diffext.networks.blocks.projector import Projector


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the loss
def test_zero_is_perfect_and_two_is_opposite() -> None:
    a = tokens(2, 8, 3, 5)
    assert float(feature_alignment(a, 7 * a)) == pytest.approx(0, abs=1e-6)
    assert float(feature_alignment(a, -a)) == pytest.approx(2, abs=1e-6)
    assert float(feature_alignment(a, tokens(2, 8, 3, 5, seed=1))) == pytest.approx(1, abs=0.2)


def test_mean_over_all_tokens() -> None:
    """One token in four is perfect, the others are at right angles."""
    student, teacher = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    student[:, 0], teacher[:, 1] = 1.0, 1.0
    teacher[:, :, 1, 0] = torch.tensor([3.0, 0.0])
    assert float(feature_alignment(student, teacher)) == pytest.approx(0.75)


@pytest.mark.parametrize("times", [2, 4])
def test_repeating_the_batch_changes_nothing(times: int) -> None:
    """METHODS 5.5-3: the authors' code divides by the batch size once more. Neither loss nor gradient may change."""
    losses, gradients = [], []
    for n in (1, times):
        student = tokens(3, 8, 4, 6).requires_grad_()
        loss = feature_alignment(student.repeat(n, 1, 1, 1), tokens(3, 8, 4, 6, seed=1).repeat(n, 1, 1, 1))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 1e-4


def test_grids_must_agree() -> None:
    """A transposed grid of a square number of tokens would broadcast or be compared crosswise."""
    with pytest.raises(ValueError, match=r"\(1, 8, 3, 5\) and teacher \(1, 8, 5, 3\) must agree, token by token"):
        feature_alignment(tokens(1, 8, 3, 5), tokens(1, 8, 5, 3))
    with pytest.raises(ValueError, match="must agree"):
        feature_alignment(tokens(1, 8, 3, 5), tokens(1, 1, 3, 5))


def test_float32_inside_of_autocast() -> None:
    student, teacher = tokens(1, 8, 3, 5), tokens(1, 8, 3, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_alignment(student.bfloat16(), teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, feature_alignment(student.bfloat16().float(), teacher))


# ------------------------------------------------------------------ slices of volumes
def test_images_are_left_alone() -> None:
    image, features = tokens(2, 1, 8, 8), tokens(2, 4, 2, 2)
    got = axial_slices(image, features, 1)
    assert got[0] is image and got[1] is features


@pytest.mark.parametrize(("depth", "levels"), [(8, 8), (8, 4), (12, 3), (7, 7), (6, 1)])
def test_slices_lie_on_each_other(depth: int, levels: int) -> None:
    """Every voxel's value is the index of its slice; a feature's is the index of its level."""
    values = torch.arange(float(depth)).view(1, 1, depth, 1, 1) + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1, 1)
    image = values.expand(2, 1, depth, 4, 6)
    places = torch.arange(float(levels)).view(1, 1, levels, 1, 1) + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1, 1)
    seen: set[float] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        slices, features = axial_slices(image, places.expand(2, 3, levels, 2, 3), 2)
        count = min(2, levels)
        assert slices.shape == (2 * count, 1, 4, 6) and features.shape == (2 * count, 3, 2, 3)
        shown, place = slices[:, 0, 0, 0], features[:, 0, 0, 0]
        assert torch.equal(shown.div(100).floor(), place.div(100).floor()), "of the same volume"
        step = depth / levels
        middle = (place % 100 + 0.5) * step - 0.5
        assert ((shown % 100 - middle).abs() <= 0.5).all(), "the slice in the middle of what the feature covers"
        assert len(set(shown.tolist())) == 2 * count, "no slice twice"
        seen |= set((place % 100).tolist())
    assert len(seen) == levels, "every level has its turn"


def test_slices_keep_their_rows_and_columns() -> None:
    image = tokens(1, 1, 4, 5, 6)
    torch.manual_seed(0)
    slices, features = axial_slices(image, image, 4)
    assert torch.equal(slices, features)
    assert {float(s[0, 1, 2]) for s in slices} == {float(v) for v in image[0, 0, :, 1, 2]}


def test_gradient_reaches_the_chosen_slices_only() -> None:
    features = tokens(2, 3, 6, 2, 2).requires_grad_()
    torch.manual_seed(0)
    axial_slices(tokens(2, 1, 6, 4, 4), features, 2)[1].sum().backward()
    assert features.grad.amax((1, 3, 4)).sum(1).tolist() == [2.0, 2.0]


# ------------------------------------------------------------------ the projector
@pytest.mark.parametrize(("kind", "spreads"), [("mlp", False), ("conv", True)])
def test_projector(kind: str, spreads: bool) -> None:
    """The MLP maps every token by itself; the convolution sees its neighbours."""
    torch.manual_seed(0)
    phi, x = Projector(6, 10, kind, hidden=16), tokens(2, 6, 5, 7)
    out = phi(x)
    assert out.shape == (2, 10, 5, 7)
    x[:, :, 2, 3] += 1.0
    changed = (phi(x) - out).abs().amax((0, 1)) > 0
    assert bool(changed[2, 3]) and int(changed.sum()) == (9 if spreads else 1)


def test_projector_of_the_authors_is_as_large() -> None:
    """192 -> 2048 -> 2048 -> 768: 6.17 M weights."""
    assert sum(p.numel() for p in Projector(192, 768).parameters()) == pytest.approx(6.17e6, rel=2e-3)


def test_unknown_projector() -> None:
    with pytest.raises(ValueError, match="unknown projector 'linear'; choose one of mlp, conv"):
        Projector(4, 4, "linear")
