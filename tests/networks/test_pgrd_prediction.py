"""What PGRD's network predicts: one step, samples, read-outs, noise."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, Kind, check_extreme_images
from tiny_pgrd import FLAT, SMALL, image_of, make_net, noise_of, onehot_of, shaken
from torch import Tensor, nn

from nnunet_diffext.diffusion import seeded_noise
from nnunet_diffext.networks import sampling
from nnunet_diffext.networks.sampling import SAMPLERS, Sampling, project, soften


# ------------------------------------------------------------------ prediction
@pytest.mark.parametrize("readout", ["heads", "simplex", "softmax"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", ["2d", "2d-resenc", "3d", "3d-aniso", "3d-aniso-resenc"])
def test_prediction_is_one_fresh_finite_map(kind: str, regions: bool, readout: str) -> None:
    net = shaken(make_net(kind, heads=3, channels=2, regions=regions, readout=readout)).eval()
    image = image_of(kind, channels=2)
    before = image.clone()
    with torch.inference_mode():
        out = net(image)
        assert type(out) is Tensor and out.dtype == torch.float32
        assert out.shape == (2, 3, *KINDS[kind].patch)
        assert torch.isfinite(out).all() and out.abs().max() < 800
        p = net.probabilities(image)
        assert p.min() >= 0 and p.max() <= 1
        if not regions:
            torch.testing.assert_close(p.sum(1), torch.ones(2, *KINDS[kind].patch))
        torch.testing.assert_close(net.label_space.probabilities(out), p, atol=1e-6, rtol=1e-5)
        first = out.clone()
        out.fill_(torch.nan)  # nnU-Net adds the mirrored passes in place
        assert torch.equal(image, before)
        assert torch.equal(net(image), first), "prediction is not bit-identical, or was spoiled by its earlier result"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_probabilities(sampler: str) -> None:
    net = shaken(make_net(SMALL, heads=3, sampling=Sampling(samples=2, steps=3, sampler=sampler))).eval()
    with torch.inference_mode():
        out = net(image_of(SMALL, 1))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.exp().sum(1), torch.ones(1, *SMALL.patch))


def test_prediction_is_the_mean_of_the_samples() -> None:
    net = shaken(make_net(sampling=Sampling(samples=3, steps=2, seed=4))).eval()
    image, drawn = image_of(), []
    plain = net.draw_probabilities
    net.draw_probabilities = lambda *args, **kwargs: drawn.append(plain(*args, **kwargs)) or drawn[-1]
    with torch.inference_mode():
        p = net.probabilities(image)
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(p, sum(drawn) / 3)


def test_extreme_images_stay_finite() -> None:
    net = shaken(make_net(sampling=Sampling(samples=1, steps=3))).eval()
    check_extreme_images(net, image_of(batch=3))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_starts_exactly_at_the_prior(hard: bool, regions: bool) -> None:
    """Before training the heads are zero: what comes out is pi, whatever the noise."""
    net = make_net(SMALL, heads=3, regions=regions, hard_prior=hard, sampling=Sampling(samples=2, steps=3)).eval()
    with torch.no_grad():
        image = image_of(SMALL)
        prior = net.prior_probabilities(image)
        torch.testing.assert_close(net.probabilities(image), prior)
        raw = net.label_space.probabilities(net.prior(image))
        wanted = net.label_space.harden(raw) if hard else raw
    torch.testing.assert_close(prior, wanted, atol=4e-4, rtol=0)
    assert prior.min() > 3e-5


def test_without_supervision_heads_one_step_is_prior_plus_residual() -> None:
    net = make_net(levels=0, readout="simplex").eval()
    net.kappa.fill_(0.2)
    image = image_of()
    with torch.no_grad():
        context = net.context(image)
        prediction, _ = net.denoise(context, noise_of(net, image), torch.tensor([999, 999]))
        got = net.sample(image, noise_of(net, image), steps=1)
    torch.testing.assert_close(got, project(context.prior - 0.2 * prediction, False))


# ------------------------------------------------------------------ read-outs
@pytest.mark.parametrize("tau", [0.1, 0.2])
def test_perfect_estimate_is_nearly_certain(tau: float) -> None:
    """A negative log-likelihood below 0.02, although one-hot values are no logits."""
    estimate = onehot_of(heads=4)
    truth = estimate.argmax(1)
    for p in (project(estimate, False), soften(estimate, tau, False)):
        assert float(nn.functional.nll_loss(p.log(), truth)) < (0.02 if tau == 0.1 else 0.03)
    assert float(nn.functional.nll_loss(soften(estimate, 1.0, False).log(), truth)) == pytest.approx(0.744, abs=1e-3)


def test_decision_of_a_sample_does_not_depend_on_tau_out() -> None:
    estimate = image_of(batch=4, channels=3)
    decisions = [soften(estimate, tau, False).argmax(1) for tau in (0.05, 0.1, 1.0)]
    assert torch.equal(decisions[0], decisions[1]) and torch.equal(decisions[1], decisions[2])
    assert torch.equal(soften(estimate, 0.1, True) > 0.5, estimate > 0.5)


def test_temperature_of_the_heads_holds_in_prediction_too() -> None:
    """What is trained, ``softmax(psi / tau)``, is what is read out."""
    plain, warm = (shaken(make_net(tau=tau)).eval() for tau in (1.0, 2.0))
    with torch.no_grad():
        a, b = (net.sample(image_of(), noise_of(net, image_of()), steps=1).log() for net in (plain, warm))
    torch.testing.assert_close((a[:, 0] - a[:, 1]) / 2, b[:, 0] - b[:, 1], atol=1e-4, rtol=1e-4)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'mean'.*heads, simplex, softmax"):
        make_net(readout="mean")
    with pytest.raises(ValueError, match="needs at least one supervision head"):
        make_net(levels=0)
    net = make_net().eval()
    with pytest.raises(ValueError, match="'euler'.*ddim, ddpm"):
        net.sample(image_of(), noise_of(net, image_of()), steps=2, sampler="euler")
    with pytest.raises(ValueError, match=r"1 \.\. 1000"):
        net.sample(image_of(), noise_of(net, image_of()), steps=0)


# ------------------------------------------------------------------ noise
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_mirrored_image_sees_mirrored_noise(kind: Kind, sampler: str) -> None:
    """As long as the predictions are mirror images of each other (here: zero), so is every u_t."""
    net = make_net(kind, sampling=Sampling(samples=1, steps=3, sampler=sampler)).eval()
    states: list[Tensor] = []
    net.step_net.register_forward_hook(lambda _, args, __: states.append(args[0]))
    net.denoise = lambda context, u, t, plain=net.denoise: (0 * plain(context, u, t)[0], plain(context, u, t)[1])
    with torch.no_grad():
        net(image_of(kind, 1))
        net(image_of(kind, 1).flip(2))
    plain, flipped = states[: len(states) // 2], states[len(states) // 2 :]
    assert len(plain) == 6 and plain[0].std() > 0.5
    assert not torch.equal(plain[0], plain[2])
    assert all(torch.equal(b, a.flip(2)) for a, b in zip(plain, flipped, strict=True))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_same_seed_same_sample(sampler: str) -> None:
    net, image = shaken(make_net(readout="simplex")).eval(), image_of()
    state = torch.get_rng_state()

    def draw(seed: int, noise_seed: int) -> Tensor:
        with torch.no_grad():
            return net.sample(image, noise_of(net, image, noise_seed), steps=4, sampler=sampler, seed=seed)

    first = draw(0, 0)
    assert torch.equal(draw(0, 0), first)
    assert not torch.equal(draw(0, 1), first)
    assert torch.equal(draw(1, 0), first) == (sampler == "ddim")
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


def test_noise_on_the_way_is_not_the_noise_of_the_start() -> None:
    """Both come from one seed; if they were equal, DDPM's first step would not be random."""
    net = make_net(sampling=Sampling(samples=1, steps=2, sampler="ddpm")).eval()
    net.denoise = lambda context, u, t, plain=net.denoise: (0 * u, plain(context, u, t)[1])
    states: list[Tensor] = []
    net.step_net.register_forward_hook(lambda _, args, __: states.append(args[0].flatten()))
    with torch.no_grad():
        net(image_of(batch=1))
    assert abs(torch.corrcoef(torch.stack(states))[0, 1]) < 0.3


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_samples_of_one_image_in_batches(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six samples are the same whether drawn together, where no noise is added on the way, or one by one."""
    net, image = shaken(make_net(sampling=Sampling(samples=6, steps=3, sampler=sampler))).eval(), image_of(batch=1)
    monkeypatch.setattr(sampling, "VOXELS_AT_ONCE", 4 * image.numel() + 1)
    sizes: list[int] = []
    net.step_net.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    halves = [seeded_noise((1, 2, *image.shape[2:]), n, mirror_axes=(2, 3)) for n in range(3)]
    fields = [field for half in halves for field in (half, -half)]
    with torch.no_grad():
        together = net.probabilities(image)
        alone = [net.sample(image, f, steps=3, sampler=sampler, seed=m) for m, f in enumerate(fields)]
    batches = [1] * 6 if sampler == "ddpm" else [4, 2]
    assert sizes == [b for b in batches for _ in range(3)] + [1] * 18
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_a_sample_does_not_depend_on_those_beside_it(sampler: str) -> None:
    net, image = shaken(make_net()).eval(), image_of(batch=1)
    one, other = (noise_of(net, image, seed) for seed in (0, 1))
    with torch.no_grad():
        drawn = net.sample(image, torch.cat([other, one]), steps=3, sampler=sampler)
        torch.testing.assert_close(drawn[1:], net.sample(image, one, steps=3, sampler=sampler))
        assert (drawn[0] - drawn[1]).abs().max() > 1e-3
