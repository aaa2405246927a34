"""A prior that is made as wrong as it will be: displaced, offset, and matched to a wanted error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_diffext.data.corruption import DISPLACEMENT, SMOOTHNESS, corrupt, matching_strength, smooth_noise


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc_logits(size: int = 48, count: int = 4) -> tuple[Tensor, Tensor]:
    """Logits of discs ``(count, 2, size, size)``, right and sure everywhere but near the edge, and the truth."""
    axis = torch.arange(float(size))
    centre = size * (0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=source()))
    distance = ((axis[:, None] - centre[:, 0]) ** 2 + (axis[None] - centre[:, 1]) ** 2).sqrt() - size / 6
    truth = torch.stack([distance >= 0, distance < 0], dim=1).float()
    return torch.stack([2 * distance, -2 * distance], dim=1), truth


def error_of(logits: Tensor, truth: Tensor, strength: float) -> float:
    return float((truth - corrupt(logits, strength, source(1)).softmax(1)).abs().mean())


@pytest.mark.parametrize("shape", [(2, 3, 20, 17), (1, 2, 6, 12, 16)])
def test_strength_zero_is_the_identity(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=source())
    assert torch.equal(corrupt(logits, 0.0), logits)
    tiny = corrupt(logits, 1e-6, source(1))
    torch.testing.assert_close(tiny, logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 20, 17), (1, 2, 6, 12, 16)])
def test_corruption_is_finite_random_and_seeded(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=source()).half()
    state = torch.get_rng_state()
    a, b, c = (corrupt(logits, 0.5, source(seed)) for seed in (1, 1, 2))
    assert a.shape == shape and a.dtype == torch.float32 and torch.isfinite(a).all()
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(corrupt(logits, 0.5), corrupt(logits, 0.5)), "without a generator: other fields every time"


def test_edges_move_by_voxels_along_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard deviation is ``strength * DISPLACEMENT`` voxels, whatever the size of the axis."""
    monkeypatch.setattr("nnunet_diffext.data.corruption.OFFSET", 0.0)
    ramp = torch.arange(48.0).view(1, 1, 48, 1).expand(40, 1, 48, 17)
    for axis, logits in ((2, ramp), (3, ramp.transpose(2, 3))):
        shift = corrupt(logits.contiguous(), 0.25, source(3)) - logits
        inside = shift.narrow(axis, 12, 24)  # the border is padded
        assert float(inside.std()) == pytest.approx(0.25 * DISPLACEMENT, rel=0.15), axis


def test_random_fields_are_smooth_and_of_about_unit_variance() -> None:
    field = smooth_noise(torch.zeros(60, 1, 33, 33), 2, source())
    assert field.shape == (60, 2, 33, 33)
    assert float(field.var()) == pytest.approx(1, rel=0.15)
    near, far = (float((field[..., :-d] * field[..., d:]).mean() / field.var()) for d in (1, 16))
    assert near > 0.9 and abs(far) < 0.2 and SMOOTHNESS == 8


def test_error_grows_with_the_strength() -> None:
    logits, truth = disc_logits()
    errors = [error_of(logits, truth, s) for s in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert errors == sorted(errors) and errors[-1] > 5 * errors[0]


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_matched_error_is_the_wanted_one(factor: float) -> None:
    """Within 15 %, also for other random fields than those it was matched on."""
    logits, truth = disc_logits(count=16)
    wanted = factor * error_of(logits, truth, 0.0)
    strength = matching_strength(lambda s: error_of(logits, truth, s), wanted)
    assert 0 < strength < 1
    assert error_of(logits, truth, strength) == pytest.approx(wanted, rel=0.05)
    fresh = [float((truth - corrupt(logits, strength, source(s)).softmax(1)).abs().mean()) for s in range(10, 16)]
    assert sum(fresh) / len(fresh) == pytest.approx(wanted, rel=0.15)


def test_matching_strength_at_its_ends() -> None:
    assert matching_strength(lambda s: 0.3 + s, 0.2) == 0.0
    assert matching_strength(lambda s: s / 10, 0.5) == 1.0
    assert matching_strength(lambda s: s**2, 0.25, iterations=12) == pytest.approx(0.5, abs=1e-3)
