"""PGRD's network: a frozen prior, a context seen once, and samples around it."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import KINDS, Kind, make_architecture, make_plans
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.pgrd import PGRDNet
from nnunet_diffext.networks.sampling import SAMPLERS, Sampling, project, soften
from nnunet_diffext.trainers import find_trainer

SMALL = Kind((8, 16, 16), ((1, 1, 1), (1, 2, 2)), features=(8, 16))
FLAT = Kind((16, 16), ((1, 1), (2, 2)), features=(8, 16))


def make_net(
    plan: str | Kind = FLAT, *, heads: int = 2, channels: int = 1, regions: bool = False, prior: bool = True, **kw: Any
) -> PGRDNet:
    """A seeded network around a random prior."""
    torch.manual_seed(0)
    architecture = make_architecture(plan)
    network = architecture.build(channels, heads) if prior else None
    return PGRDNet(network, architecture, channels, LabelSpace(heads, regions), **kw)


def shaken(net: PGRDNet) -> PGRDNet:
    """As after some training: the heads are not at zero."""
    generator = torch.Generator().manual_seed(5)
    for layer in net.heads.seg_layers if net.heads is not None else ():
        layer.weight.data.normal_(0, 0.3, generator=generator)
    return net


def image_of(kind: str | Kind = FLAT, batch: int = 2, channels: int = 1, seed: int = 1) -> Tensor:
    patch = (KINDS[kind] if isinstance(kind, str) else kind).patch
    return torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(seed))


def onehot_of(kind: str | Kind = FLAT, batch: int = 2, heads: int = 2) -> Tensor:
    labels = image_of(kind, batch, heads, 2).argmax(1)
    return nn.functional.one_hot(labels, heads).movedim(-1, 1).float().contiguous()


def noise_of(net: PGRDNet, image: Tensor, seed: int = 3) -> Tensor:
    shape = (len(image), net.label_space.num_heads, *image.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    image = image_of(batch=3)
    image[0], image[1], image[2] = 0, 1e4, 1e4 * image[2]
    with torch.no_grad():
        out = net(image)
    assert torch.isfinite(out).all() and out.abs().max() < 800


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


# ------------------------------------------------------------------ what runs how often
def count(net: PGRDNet) -> Counter[str]:
    """Forward passes of the parts from now on."""
    counts: Counter[str] = Counter()
    for name in ("prior", "context_net", "step_net"):
        if getattr(net, name) is not None:
            getattr(net, name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (1, 7), (3, 4)])
@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_number_of_evaluations(samples: int, steps: int, sampler: str, prior: bool, inference: bool) -> None:
    net = make_net(prior=prior, sampling=Sampling(samples=samples, steps=steps, sampler=sampler)).eval()
    counts = count(net)
    with torch.inference_mode(inference), torch.no_grad():
        net(image_of())
    assert counts == {"context_net": 1, "step_net": samples * steps, **({"prior": 1} if prior else {})}


def test_number_of_evaluations_in_training() -> None:
    net = make_net()
    counts = count(net)
    net(image_of(), clean=onehot_of())
    assert counts == {"prior": 1, "context_net": 1, "step_net": 1}
    net(image_of(), clean=onehot_of(), prior=net.prior_probabilities(image_of()))
    assert counts["prior"] == 2, "a given prior replaces the own one"


@pytest.mark.parametrize("inference", [True, False])
def test_context_is_kept_for_one_unchanged_image_only(inference: bool) -> None:
    net, other = shaken(make_net()).eval(), shaken(make_net()).eval()
    counts = count(net)
    with torch.inference_mode(inference), torch.no_grad():
        image = image_of()
        noise = noise_of(net, image)

        def sample(x: Tensor) -> Tensor:
            return net.sample(x, noise, steps=1)

        def fresh(x: Tensor) -> Tensor:
            return other.sample(x.clone(), noise, steps=1)

        first = sample(image)
        assert torch.equal(sample(image), first) and counts["context_net"] == 1
        another = image_of(seed=9)
        assert torch.equal(sample(another), fresh(another)) and counts["context_net"] == 2
        another[:, :, 3:9] += 2.0
        changed = sample(another)
        assert torch.equal(changed, fresh(another)) and counts["context_net"] == 3
        another.data.mul_(0.5)
        assert torch.equal(sample(another), fresh(another)) and counts["context_net"] == 4


def test_context_is_forgotten_with_the_weights() -> None:
    """Several folds are predicted by loading one after the other into the same network."""
    net, other = make_net().eval(), make_net().eval()
    for p in other.prior.parameters():
        p.data.mul_(1.3)
    image = image_of()
    noise = noise_of(net, image)
    with torch.inference_mode():
        before = net.sample(image, noise, steps=1)
        net.load_state_dict(other.state_dict())
        after = net.sample(image, noise, steps=1)
        assert torch.equal(after, other.sample(image, noise, steps=1)) and not torch.equal(after, before)


def test_gradients_after_inference_mode() -> None:
    net, image = shaken(make_net()).eval(), image_of()
    with torch.inference_mode():
        net(image)
        net.sample(image, noise_of(net, image), steps=1)
    image.requires_grad_()
    net(image).square().sum().backward()
    assert image.grad.abs().max() > 0
    assert net._kept is None


def test_defaults_of_sampling() -> None:
    assert (make_net().default_samples, make_net().default_steps, make_net().default_sampler) == (0, 1, "ddim")
    net = make_net(sampling=Sampling(samples=5, steps=20, sampler="ddpm"))
    assert (net.default_samples, net.default_steps, net.default_sampler) == (5, 20, "ddpm")


# ------------------------------------------------------------------ the prior is frozen
def test_prior_is_frozen_and_in_eval_mode() -> None:
    net = make_net()
    net.train()
    assert net.training and net.step_net.training and not any(m.training for m in net.prior.modules())
    assert not any(p.requires_grad for p in net.prior.parameters())
    assert all(p.requires_grad for n, p in net.named_parameters() if not n.startswith("prior."))
    before = deepcopy(net.prior.state_dict())
    out = net(image_of(), clean=onehot_of())
    (out.prediction.square().mean() + sum(h.square().mean() for h in out.heads)).backward()
    assert all(p.grad is None for p in net.prior.parameters())
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in net.prior.state_dict().items())


def test_network_without_prior_has_none() -> None:
    net = make_net(prior=False)
    assert net.prior is None and not any(k.startswith("prior") for k in net.state_dict())
    assert net.context_net.encoder[0][0].convs[0].conv.in_channels == 1  # the image alone
    assert make_net().context_net.encoder[0][0].convs[0].conv.in_channels == 3
    image = image_of()
    outs = []
    for prior in (None, torch.full((2, 2, 16, 16), 0.9)):
        torch.manual_seed(1)
        outs.append(net(image, clean=onehot_of(), prior=prior))
    assert torch.equal(outs[0].prediction, outs[1].prediction) and torch.equal(outs[0].target, outs[1].target)


# ------------------------------------------------------------------ training
def test_training_state_is_eq7() -> None:
    """``s_t = pi + sqrt(rho) r_0 + kappa sqrt(1 - rho) eps``, and the target is eq. 3."""
    net = make_net(terminal_share=0.0)
    net.kappa.fill_(0.25)
    seen: list[tuple[Tensor, Tensor]] = []
    net.denoise = lambda context, u, t, plain=net.denoise: seen.append((u, t)) or plain(context, u, t)
    image, clean = image_of(batch=16), onehot_of(batch=16)
    torch.manual_seed(3)
    out = net(image, clean=clean)
    torch.manual_seed(3)
    t = torch.randint(1000, (16,))
    torch.rand(16)
    eps = torch.randn(clean.shape)
    ((u_t, seen_t),) = seen
    assert torch.equal(seen_t, t) and torch.equal(out.t, t)
    prior, rho = net.prior_probabilities(image), net.schedule.alpha_bar[t].view(-1, 1, 1, 1)
    s_t = rho.sqrt() * clean + (1 - rho.sqrt()) * prior + 0.25 * (1 - rho).sqrt() * eps
    torch.testing.assert_close(prior + 0.25 * u_t, s_t, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.target, rho.sqrt() * eps - (1 - rho).sqrt() * (clean - prior) / 0.25)


def test_unannotated_voxels_have_no_residual() -> None:
    """An ignored voxel is zero in every channel of ``clean``, which is nobody's label."""
    net = make_net(terminal_share=1.0)
    valid = image_of(seed=8) > 0
    out = net(image_of(), clean=onehot_of() * valid, valid=valid)
    ignored = ~valid.expand_as(out.target)
    assert out.target[ignored].abs().max() == 0  # v at t = T is -u_0
    assert out.target[~ignored].abs().max() > 0.1


def test_label_leak_is_impossible_at_the_last_t() -> None:
    """At t = T the state is the noise, bit for bit: nothing of the label reaches the network."""
    net = make_net(terminal_share=1.0)
    outs = []
    for clean in (onehot_of(), 1 - onehot_of()):
        torch.manual_seed(2)
        outs.append(net(image_of(), clean=clean))
    assert torch.equal(outs[0].t, torch.full((2,), 999))
    assert torch.equal(outs[0].prediction, outs[1].prediction)
    assert all(torch.equal(a, b) for a, b in zip(outs[0].heads, outs[1].heads, strict=True))
    assert not torch.equal(outs[0].target, outs[1].target)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_the_last_t(share: float) -> None:
    net = make_net(terminal_share=share)
    torch.manual_seed(0)
    t = net.random_timesteps(20_000, torch.device("cpu"))
    last = share + (1 - share) / 1000
    assert float((t == 999).float().mean()) == pytest.approx(last, abs=4 * (last / 20_000) ** 0.5)
    if share < 1:
        assert float(t[t < 999].float().mean()) == pytest.approx(499, abs=12)


def test_heads_of_all_levels() -> None:
    net = make_net("3d", heads=3, levels=3)
    out = net(image_of("3d"), clean=onehot_of("3d", heads=3))
    assert [tuple(h.shape) for h in out.heads] == [(2, 3, 8, 12, 16), (2, 3, 4, 6, 8), (2, 3, 2, 3, 4)]
    assert len(make_net(FLAT, levels=3).heads.seg_layers) == 2  # no more than there are


# ------------------------------------------------------------------ as nnU-Net builds it
def test_state_dict_does_not_depend_on_deep_supervision() -> None:
    for tokens in ("", "_noPGR", "_noDDS", "_vanillaDDPM", "_hardPrior"):
        trainer = find_trainer(f"PGRDTrainer{tokens}")
        plans = make_plans("3d-aniso-resenc")
        plans["diffext"] = {
            "PGRDTrainer": trainer.Settings(**trainer.overrides).as_dict(),
            "label_space": {"num_heads": 3, "regions": False, "ignore_label": None},
        }
        manager = PlansManager(plans)
        arguments = (manager, manager.get_configuration("3d_fullres"), 2, 3)
        on, off = (trainer.build_network_architecture(*arguments, enable_deep_supervision=d) for d in (True, False))
        assert type(on) is type(off) is PGRDNet
        off.load_state_dict(on.state_dict(), strict=True)
        assert (on.prior is None) == (tokens in ("_noPGR", "_vanillaDDPM"))
        k = {n for n, m in on.named_modules() if isinstance(m, nn.Conv3d) and m.out_channels == 3}
        assert k and all(".seg_layers." in n for n in k), "nnU-Net's -pretrained_weights skips heads by this name"
