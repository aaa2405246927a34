"""PGRD's network: a context seen once, a frozen prior, and what it is trained on."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import make_plans
from tiny_pgrd import FLAT, image_of, make_net, noise_of, onehot_of, shaken
from torch import Tensor

from nnunet_diffext.diffusion import trailing_timesteps
from nnunet_diffext.networks.pgrd import PGRDNet
from nnunet_diffext.networks.sampling import Sampling
from nnunet_diffext.trainers import find_trainer


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
    assert net.context_net.fine_in.in_channels == 1  # the image alone
    assert make_net().context_net.fine_in.in_channels == 3
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
    t = net.random_timesteps(16, image.device)
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


def test_training_times_are_those_of_samples() -> None:
    """A quarter of them in every one of four steps, however these are spaced."""
    torch.manual_seed(0)
    for power in (1.0, 3.0):
        net = make_net(terminal_share=0.0, step_power=power)
        t = net.random_timesteps(20_000, torch.device("cpu"))
        assert t.min() >= 0 and t.max() == 999
        steps = torch.tensor(trailing_timesteps(1000, 4, power) + [-1]).flip(0)
        share = torch.histogram(t.double(), steps.double() + 0.5).hist / len(t)
        torch.testing.assert_close(share, torch.full((4,), 0.25).double(), atol=0.02, rtol=0)


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
