"""Preconditioning: the best linear prediction from x_t, and a remainder of unit variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_diffext.diffusion import NoiseSchedule, target, to_x0
from nnunet_diffext.diffusion.preconditioning import precondition

KINDS = ("v", "x0", "eps")
N = 100_000


def schedule_for(kind: str) -> NoiseSchedule:
    return NoiseSchedule("cosine", 1000, zero_terminal_snr=kind != "eps")


@pytest.mark.parametrize("spread", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("t", [10, 300, 800, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_is_the_regression_on_x_t_and_the_remainder_has_unit_variance(kind: str, t: int, spread: float) -> None:
    schedule, generator = schedule_for(kind), torch.Generator().manual_seed(t)
    x0, eps = spread * torch.randn(1, 1, N, generator=generator), torch.randn(1, 1, N, generator=generator)
    time = torch.tensor([t])
    x_t = schedule.add_noise(x0, eps, time).double()
    wanted = target(kind, x0, eps, time, schedule).double()
    factors = [float(f) for f in precondition(kind, schedule, time, spread, 3)]
    into, skip, out, _ = factors
    # standard errors of a variance and of a regression coefficient
    assert float((into * x_t).var()) == pytest.approx(1, rel=4 * math.sqrt(2 / N))
    slope = float((x_t * wanted).mean() / x_t.square().mean())
    assert skip == pytest.approx(slope, abs=4 * out * into / math.sqrt(N) + 1e-6)
    remainder = wanted - skip * x_t
    if out > 1e-3:  # below, float32 targets have no digits left
        assert float(remainder.std()) == pytest.approx(out, rel=4 / math.sqrt(2 * N) + 1e-3)


def estimates(mean: Tensor, network: Tensor, x_t: Tensor, t: Tensor, spread: float) -> dict[str, Tensor]:
    """x_0 as each kind predicts it with the same network output and mean."""
    schedule, results = NoiseSchedule("cosine", 1000), {}
    for kind, sign in (("v", -1), ("x0", 1), ("eps", -1)):
        f = precondition(kind, schedule, t, spread, x_t.ndim)
        prediction = f.skip * x_t + f.mean * mean + f.out * sign * network
        results[kind] = to_x0(prediction, x_t, t, schedule, kind)
    return results


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_kinds_are_one_denoiser(spread: float) -> None:
    t = torch.tensor([5, 100, 500, 900])
    mean, network, x_t = (torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(s)) for s in range(3))
    found = estimates(mean, network, x_t, t, spread)
    for kind in ("x0", "eps"):
        torch.testing.assert_close(found[kind], found["v"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_at_the_last_t_only_the_mean_and_the_network_count(kind: str) -> None:
    schedule, t = schedule_for(kind), torch.tensor([999, 999])
    x_t, mean, network = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    f = precondition(kind, schedule, t, 0.3, 3)
    x0 = to_x0(f.skip * x_t + f.mean * mean + f.out * network, x_t, t, schedule, kind)
    sign = 1 if kind == "x0" else -1
    torch.testing.assert_close(x0, mean + sign * 0.3 * network)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_forgotten_at_t_0(kind: str) -> None:
    """There x_t is x_0: whatever the network thought before it saw x_t must not spoil the estimate."""
    schedule, t = schedule_for(kind), torch.tensor([0])
    f = precondition(kind, schedule, t, 0.3, 3)
    x_t = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    shift = to_x0(f.skip * x_t + f.mean, x_t, t, schedule, kind) - to_x0(f.skip * x_t, x_t, t, schedule, kind)
    share = torch.full_like(x_t, schedule.alpha_sigma(0)[1] ** 2)
    torch.testing.assert_close(shift, share, atol=1e-6, rtol=0)


def test_factors_are_made_in_fp32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factors = precondition("v", schedule_for("v"), torch.tensor([3, 998]), torch.tensor(0.1), 4)
    assert all(f.dtype == torch.float32 and f.shape == (2, 1, 1, 1) for f in factors)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'score'.*x0, v, eps"):
        precondition("score", NoiseSchedule(), torch.tensor([1]), 1.0, 3)
