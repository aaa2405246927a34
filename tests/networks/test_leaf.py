"""LEAF's network: one step from pure noise to the mask's latent, around a frozen codec."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny import KINDS, check_cases_are_independent, check_extreme_images, make_architecture
from tiny_latent import FLAT, SMALL, Oracle, image_of, make_codec, make_leaf, noise_of, onehot_of, patch_of
from torch import Tensor, nn

from nnunet_diffext.networks.leaf import LEAFNet
from nnunet_diffext.networks.sampling import Sampling

PREDICTIONS = {
    "x0": {"kind": "x0"},
    "v": {"kind": "v"},
    "eps": {"kind": "eps", "zero_terminal_snr": False},
    "eps-scaled": {"kind": "eps", "zero_terminal_snr": False, "schedule": "scaled_linear"},
}


# ------------------------------------------------------------------ prediction
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_one_fresh_finite_map(kind: str, regions: bool) -> None:
    net = make_leaf(kind, heads=3, channels=2, regions=regions).eval()
    image = image_of(kind, channels=2)
    before, state = image.clone(), torch.get_rng_state()
    with torch.inference_mode():
        out = net(image)
        assert type(out) is Tensor and out.dtype == torch.float32
        assert out.shape == (2, 3, *KINDS[kind].patch)
        assert torch.isfinite(out).all() and out.abs().max() < 800
        first = out.clone()
        out.fill_(torch.nan)  # nnU-Net adds the mirrored passes in place
        assert torch.equal(image, before)
        assert torch.equal(net(image), first), "prediction is not bit-identical, or was spoiled by its earlier result"
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_case_does_not_depend_on_its_batch(prediction: str, steps: int) -> None:
    net = make_leaf(sampling=Sampling(steps=steps), **PREDICTIONS[prediction]).eval()
    check_cases_are_independent(net, image_of(batch=3))


def test_extreme_images_stay_finite() -> None:
    net = make_leaf(SMALL, sampling=Sampling(steps=3)).eval()
    check_extreme_images(net, image_of(SMALL, batch=3))


def count(net: LEAFNet) -> Counter[str]:
    """Forward passes of the parts from now on."""
    counts: Counter[str] = Counter()
    for name in ("encoder", "unet", "codec.encoder", "codec.decoder"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (1, 10), (3, 4)])
def test_number_of_evaluations(samples: int, steps: int) -> None:
    net = make_leaf(sampling=Sampling(samples=samples, steps=steps)).eval()
    counts = count(net)
    with torch.no_grad():
        net(image_of())
    assert counts == {"encoder": 1, "unet": samples * steps, "codec.decoder": samples}
    assert (net.default_samples, net.default_steps) == ((0 if steps == 1 else samples), steps)


def test_number_of_evaluations_of_samples_of_one_image() -> None:
    """What ``nnunet_diffext predict -samples`` calls."""
    net, image = make_leaf().eval(), image_of()
    counts = count(net)
    with torch.no_grad():
        a, b = (net.sample(image, noise_of(net, image, seed), steps=2) for seed in (0, 1))
        again = net.sample(image, noise_of(net, image, 0), steps=2)
    assert counts == {"encoder": 1, "unet": 6, "codec.decoder": 3}
    assert torch.equal(a, again) and not torch.equal(a, b)
    torch.testing.assert_close(a.sum(1), torch.ones(2, *FLAT.patch))


@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_mirrored_image_sees_mirrored_noise(kind: Any) -> None:
    net = make_leaf(kind).eval()
    seen: list[Tensor] = []
    net.unet.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    with torch.no_grad():
        net(image_of(kind))
        net(image_of(kind).flip(2))
    assert torch.equal(seen[0], seen[0].flip(2)) and torch.equal(seen[0], seen[1]), "symmetric, and always the same"
    assert torch.equal(seen[0][0], seen[0][1]) and abs(float(seen[0].std()) - 1) < 0.2
    assert seen[0].shape[1:] == (net.codec.channels, *net.codec.encode(onehot_of(kind)).shape[2:])


# ------------------------------------------------------------------ a U-Net that knows the answer (METHODS 5.5-1)
def knowing(kind: Any, prediction: str, steps: int, **options: Any) -> tuple[LEAFNet, Tensor]:
    """A network that knows the latents of some masks, and these."""
    net = make_leaf(kind, heads=3, sampling=Sampling(steps=steps), **PREDICTIONS[prediction], **options).eval()
    z0 = net.encode_masks(onehot_of(kind, heads=3))
    net.unet = Oracle(net.kind, net.schedule, z0)
    return net, z0


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_perfect_network_gives_the_decoded_latent(kind: Any, prediction: str, steps: int) -> None:
    net, z0 = knowing(kind, prediction, steps)
    with torch.no_grad():
        wanted = net.codec.decode(z0).log_softmax(1)
        got = net(image_of(kind))
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    times = [t[0] for t in net.unet.timesteps]
    assert times[0] == 999 and len(times) == steps
    assert steps > 1 or net.unet.timesteps == [[999, 999]]
    assert times == sorted(set(times), reverse=True)


@pytest.mark.parametrize("clip", [False, True])
def test_latents_are_clamped_on_demand_only(clip: bool) -> None:
    """The authors' code truncates at inference what training never truncates."""
    net, z0 = knowing(FLAT, "x0", 1, clip_latents=clip)
    assert z0.abs().max() > 1.5
    with torch.no_grad():
        plain, clamped = (net.codec.decode(z).softmax(1) for z in (z0, z0.clamp(-1, 1)))
        got = net.probabilities(image_of())
    assert (plain - clamped).abs().max() > 1e-2
    torch.testing.assert_close(got, clamped if clip else plain)


def test_round_trip_is_the_reconstruction() -> None:
    """5.5-5: standardising and back is no change, and nothing is clamped on the way."""
    net, masks = make_leaf(heads=3), onehot_of(heads=3)
    with torch.no_grad():
        torch.testing.assert_close(
            net.codec.decode(net.encode_masks(masks)), net.codec(masks.bool()), atol=1e-4, rtol=1e-4
        )


# ------------------------------------------------------------------ training
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_training_output_of_a_perfect_network(kind: Any, prediction: str) -> None:
    net, z0 = knowing(kind, prediction, 1)
    torch.manual_seed(1)
    out = net.train()(image_of(kind), clean=onehot_of(kind, heads=3))
    torch.testing.assert_close(out.prediction, out.target, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.estimate, z0, atol=1e-3, rtol=1e-3)
    assert out.trust.shape == (2, *(1,) * z0[0].ndim)


def test_trust_in_estimates() -> None:
    """``min(1, abar / 0.01)`` where the noise is predicted, which is divided by the root of abar; 1 elsewhere."""
    for prediction, options in PREDICTIONS.items():
        net = make_leaf(terminal_share=1.0, **options)
        out = net(image_of(), clean=onehot_of())
        last = float(net.schedule.alpha_bar[-1]) / 0.01 if prediction.startswith("eps") else 1.0
        torch.testing.assert_close(out.trust, torch.full((2, 1, 1, 1), last))
        assert 0.01 < last <= 1


def test_label_leak_is_impossible_at_the_last_t() -> None:
    """At t = T the U-Net's input is noise and image, bit for bit."""
    net = make_leaf(terminal_share=1.0)
    outs = []
    for clean in (onehot_of(), 1 - onehot_of()):
        torch.manual_seed(2)
        outs.append(net(image_of(), clean=clean))
    assert torch.equal(outs[0].prediction, outs[1].prediction) and not torch.equal(outs[0].target, outs[1].target)


def test_codec_is_frozen_and_in_eval_mode() -> None:
    net = make_leaf().train()
    assert net.training and net.encoder.training and not any(m.training for m in net.codec.modules())
    assert all(p.requires_grad != n.startswith("codec.") for n, p in net.named_parameters())
    before = deepcopy(net.codec.state_dict())
    out = net(image_of(), clean=onehot_of())
    (out.prediction.square().mean() + net.codec.decode(out.estimate).square().mean()).backward()
    assert all(p.grad is None for p in net.codec.parameters())
    assert all(p.grad is not None for p in net.encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.codec.state_dict().items())


@pytest.mark.parametrize(("level", "channels"), [(0, 8), (1, 8), (5, 8)])
def test_aligned_level(level: int, channels: int) -> None:
    """0 is the resolution of the latents; there is no deeper one than the deepest."""
    net = make_leaf("2d-deep", align_level=level) if level == 5 else make_leaf(align_level=level)
    out = net(image_of("2d-deep" if level == 5 else FLAT), clean=onehot_of("2d-deep" if level == 5 else FLAT))
    assert net.align_channels == out.features.shape[1] == channels
    assert out.features.shape[2:] == {0: (8, 12), 1: (4, 6), 5: (2, 2)}[level]
    assert net.align_level == {0: 0, 1: 1, 5: 2}[level]


@pytest.mark.parametrize(("latents", "expected"), [(None, 4), (6, 6)])
def test_width_of_the_image_latents(latents: int | None, expected: int) -> None:
    net = make_leaf(image_latents=latents)
    assert net.known(image_of()).shape[1] == expected


@pytest.mark.parametrize("kind", ["2d", "3d-aniso-resenc"])
def test_image_encoder_starts_from_the_codec(kind: str) -> None:
    """Everything but the first convolution, which sees classes there, and what follows from its width."""
    net = make_leaf(kind, heads=3, channels=1)
    torch.nn.init.zeros_(net.encoder.to_latent.bias)
    for p in net.codec.parameters():
        p.data.add_(0.1)
    different = {k for k, v in net.encoder.state_dict().items() if v.shape != net.codec.encoder.state_dict()[k].shape}
    before = deepcopy(net.codec.state_dict())
    copied = net.start_from_codec()
    here, there = net.encoder.state_dict(), net.codec.encoder.state_dict()
    assert {k for k in here if here[k].shape == there[k].shape and torch.equal(here[k], there[k])} == (
        here.keys() - different
    )
    assert copied == len(here) - len(different) and 0 < len(different) < 0.2 * len(here)
    assert all(torch.equal(v, before[k]) for k, v in net.codec.state_dict().items())
    assert not {p.data_ptr() for p in net.encoder.parameters()} & {p.data_ptr() for p in net.codec.parameters()}


def test_paper_size_of_the_latents_shapes_the_unet() -> None:
    """The planned stages below the codec's resolution, on image latents and noisy mask latents together."""
    plan = make_architecture("3d")
    net = LEAFNet(make_codec("3d"), plan, 1, make_codec("3d").label_space, image_latents=7)
    first = next(m for m in net.unet.encoder.modules() if isinstance(m, nn.Conv3d))
    assert first.in_channels == 7 + 4 and first.stride == (1, 1, 1)
    assert len(net.unet.encoder) == 2 and patch_of("3d") == (8, 12, 16)
