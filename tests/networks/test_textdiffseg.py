"""TextDiffSeg's network: image and text once, label latents without a learnt scale, a clean estimate that is clean."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import KINDS, check_cases_are_independent, check_extreme_images, make_architecture
from tiny_latent import FLAT, SMALL, TEXT, Oracle, image_of, make_text, noise_of, onehot_of
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule
from nnunet_diffext.diffusion.parameterization import to_x0
from nnunet_diffext.networks.blocks.attention import SelfAttention
from nnunet_diffext.networks.blocks.norm import standardise_sample
from nnunet_diffext.networks.latent import LatentEncoder
from nnunet_diffext.networks.sampling import Sampling
from nnunet_diffext.networks.textdiffseg import LabelCodec

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "zeta1": {"text_fusion": "concatenation"},
    "zeta2": {"simple_image": True},
    "zeta3": {"simple_labels": True},
    "twoStage": {"frozen": True},
    "v": {"kind": "v"},
    "eps": {"kind": "eps", "zero_terminal_snr": False},
    "throughEncoder": {"stop_gradient": False},
}


# ------------------------------------------------------------------ prediction
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["2d", "3d-aniso-resenc"])
def test_prediction_is_one_fresh_finite_map(kind: str, variant: str) -> None:
    net = make_text(kind, heads=3, channels=2, sampling=Sampling(steps=3), **VARIANTS[variant]).eval()
    image = image_of(kind, channels=2)
    before, state = image.clone(), torch.get_rng_state()
    with torch.inference_mode():
        out = net(image)
        assert type(out) is Tensor and out.dtype == torch.float32
        assert out.shape == (2, 3, *KINDS[kind].patch)
        assert torch.isfinite(out).all() and out.abs().max() < 800
        first = out.clone()
        out.fill_(torch.nan)
        assert torch.equal(image, before)
        assert torch.equal(net(image), first), "prediction is not bit-identical, or was spoiled by its earlier result"
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan(kind: str, regions: bool) -> None:
    net = make_text(kind, heads=3, regions=regions)
    out = net(image_of(kind), clean=onehot_of(kind, heads=3))
    assert out.logits.shape == out.reconstruction.shape == (2, 3, *KINDS[kind].patch)
    assert out.prediction.shape == out.target.shape == out.latents.shape
    with torch.no_grad():
        assert net.eval()(image_of(kind)).shape == (2, 3, *KINDS[kind].patch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_case_does_not_depend_on_its_batch(variant: str) -> None:
    net = make_text(sampling=Sampling(steps=10), **VARIANTS[variant]).eval()
    check_cases_are_independent(net, image_of(batch=3))


def test_extreme_images_stay_finite() -> None:
    net = make_text(SMALL, sampling=Sampling(steps=3)).eval()
    check_extreme_images(net, image_of(SMALL, batch=3))


@pytest.mark.parametrize(("samples", "steps"), [(1, 1), (1, 10), (3, 4)])
def test_number_of_evaluations(samples: int, steps: int) -> None:
    """Image and text once, for all steps and samples; the label encoder never."""
    net = make_text(sampling=Sampling(samples=samples, steps=steps)).eval()
    counts: Counter[str] = Counter()
    for name in ("encoder.stages", "encoder.attention.1", "codec.encoder", "text", "to_condition", "denoiser", "codec"):
        part = net.get_submodule(name)
        part = part[0] if isinstance(part, nn.ModuleList) else part
        part.register_forward_hook(lambda *_, name=name: counts.update([name]))
    net.codec.decoder.register_forward_hook(lambda *_: counts.update(["decoder"]))
    with torch.no_grad():
        net(image_of())
        once = {"encoder.stages": 1, "encoder.attention.1": 1, "text": 1, "to_condition": 1}
        assert counts == {**once, "denoiser": samples * steps, "decoder": samples}
        image = image_of()
        for seed in (0, 1):
            net.sample(image, noise_of(net, image, seed), steps=2)
    assert counts["text"] == 2 and counts["denoiser"] == samples * steps + 4


# ------------------------------------------------------------------ text
def test_text_reaches_the_prediction() -> None:
    net = make_text(sampling=Sampling(steps=2)).eval()
    with torch.no_grad():
        before = net(image_of())
        net.tokens[1] = -net.tokens[1]
        assert (net(image_of()) - before).abs().max() > 1e-4


@pytest.mark.parametrize("variant", ["default", "zeta1"])
def test_padding_of_short_prompts_changes_nothing(variant: str) -> None:
    net = make_text(sampling=Sampling(steps=2), **VARIANTS[variant]).eval()
    net.token_mask[0, 2] = False
    with torch.no_grad():
        before = net(image_of())
        net.tokens[0, 2] = 50.0
        assert torch.equal(net(image_of()), before)
        net.tokens[0, 1] = 50.0
        assert (net(image_of()) - before).abs().max() > 1e-4


def test_tokens_travel_with_the_weights() -> None:
    """So that prediction needs no text encoder."""
    net, other = make_text(), make_text()
    assert net.state_dict()["tokens"].shape == TEXT and net.state_dict()["token_mask"].shape == TEXT[:2]
    net.tokens.mul_(2)
    net.token_mask[1, 2] = False
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other.tokens, net.tokens) and torch.equal(other.token_mask, net.token_mask)
    assert not any(name.startswith("token") for name, _ in net.named_parameters())


# ------------------------------------------------------------------ label latents (METHODS 3.5-2)
@pytest.mark.parametrize("simple", [False, True])
@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_latents_are_standardised_and_stay_so(kind: Any, simple: bool) -> None:
    """Mean 0 and variance 1 in every sample, also after training; no scale is learnt that could grow."""
    net = make_text(kind, heads=3, simple_labels=simple, stop_gradient=False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for step in range(20):
        out = net(image_of(kind), clean=onehot_of(kind, heads=3, seed=step))
        optimizer.zero_grad()
        (out.prediction - out.target).square().mean().backward()
        optimizer.step()
    z = net.codec.encode(onehot_of(kind, heads=3, seed=99)).flatten(1)
    assert z.mean(1).abs().max() < 1e-3
    torch.testing.assert_close(z.var(1, unbiased=False), torch.ones(2), atol=1e-2, rtol=0)
    if not simple:
        for p in net.codec.encoder.to_latent.parameters():
            p.data.mul_(10)
        again = net.codec.encode(onehot_of(kind, heads=3, seed=99)).flatten(1)
        torch.testing.assert_close(again, z, atol=1e-3, rtol=1e-3)


def test_error_of_an_untrained_denoiser_is_that_of_guessing_zero() -> None:
    """Nothing is known, and the target has variance 1: the normalisation gives nothing away."""
    net = make_text(kind="eps", zero_terminal_snr=False)
    net.denoiser.seg_layers[0].weight.data.zero_()
    net.denoiser.seg_layers[0].bias.data.zero_()
    out = net(image_of(batch=32), clean=onehot_of(batch=32))
    assert (out.prediction - out.target).square().mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", [FLAT, SMALL])
def test_simple_labels_are_averages(kind: Any) -> None:
    """Ablation zeta_3: one-hot masks averaged over a latent's voxels, a fixed projection, nothing learnt."""
    codec = LabelCodec(make_architecture(kind), LabelSpace(3), simple=True)
    masks = onehot_of(kind, heads=3)
    pool = nn.functional.avg_pool3d if kind is SMALL else nn.functional.avg_pool2d
    wanted = torch.einsum("ck,bk...->bc...", codec.projection, pool(masks, codec.stride))
    torch.testing.assert_close(codec.encode(masks), standardise_sample(wanted))
    assert codec.encoder is None and not any("projection" in n for n, _ in codec.named_parameters())
    torch.manual_seed(7)
    again = LabelCodec(make_architecture(kind), LabelSpace(3), simple=True)
    assert torch.equal(again.projection, codec.projection)


# ------------------------------------------------------------------ the clean estimate (METHODS 3.5-3)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_true_noise_gives_the_clean_latent(schedule: str) -> None:
    """At every t with sqrt(abar) > 0.02, and the decoder sees what it sees of the label's own latent."""
    net, table = make_text(heads=3), NoiseSchedule(schedule, 1000)
    z0 = net.codec.encode(onehot_of(heads=3)).detach()
    decoded = net.codec.decode(z0)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    checked = 0
    for t in torch.arange(1000)[table.sqrt_alpha_bar > 0.02].split(50):
        z = z0[:1].expand(len(t), -1, -1, -1)
        e = noise[:1].expand_as(z)
        estimate = to_x0(e, table.add_noise(z, e, t), t, table, "eps")
        torch.testing.assert_close(standardise_sample(estimate), z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(net.codec.decode(estimate[-1:]), decoded[:1], atol=1e-3, rtol=1e-3)
        checked += len(t)
    assert checked > 800


@pytest.mark.parametrize("variant", ["default", "v", "eps"])
def test_training_and_sampling_with_a_perfect_denoiser(variant: str) -> None:
    net = make_text(heads=3, sampling=Sampling(steps=10), decoder_noise=0.0, **VARIANTS[variant])
    z0 = net.codec.encode(onehot_of(heads=3)).detach()
    net.denoiser = Oracle(net.kind, net.schedule, z0)
    wanted = net.codec.decode(z0)
    torch.manual_seed(2)
    out = net(image_of(), clean=onehot_of(heads=3))
    torch.testing.assert_close(out.prediction, out.target, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.logits, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.reconstruction, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.eval()(image_of()), wanted.log_softmax(1), atol=2e-3, rtol=2e-3)


def test_noise_for_the_decoder_in_training_only() -> None:
    net = make_text(decoder_noise=0.3)
    seen: list[Tensor] = []
    net.codec.decoder.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    out = net(image_of(batch=16), clean=onehot_of(batch=16))
    wanted = standardise_sample(out.latents + 0.3 * torch.randn_like(out.latents))
    own = seen[0] - out.latents.detach()
    assert float(own.std()) == pytest.approx(float((wanted - out.latents).std().detach()), rel=0.1)
    with torch.no_grad():
        assert torch.equal(net.eval()(image_of()), net(image_of()))


@pytest.mark.parametrize("variant", ["default", "eps"])
def test_trust_in_estimates(variant: str) -> None:
    net = make_text(terminal_share=1.0, **VARIANTS[variant])
    out = net(image_of(), clean=onehot_of())
    expected = 100 * float(net.schedule.alpha_bar[-1]) if variant == "eps" else 1.0
    assert out.trust.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-3, abs=1e-12)
    assert torch.isfinite(out.logits).all()


# ------------------------------------------------------------------ what reaches the label encoder
def diffusion_gradient(**options: Any) -> float:
    """Of the label encoder's weights, from eq. 5 alone."""
    net = make_text(**options)
    out = net(image_of(), clean=onehot_of())
    (out.prediction - out.target).square().mean().backward()
    grads = [p.grad for p in net.codec.encoder.parameters()]
    return max((float(g.abs().max()) for g in grads if g is not None), default=0.0)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_diffusion_loss_stops_at_the_labels(kind: str) -> None:
    assert diffusion_gradient(kind=kind) == 0
    assert diffusion_gradient(kind=kind, stop_gradient=False) > 1e-6


def test_anchor_reaches_the_labels_all_the_same() -> None:
    net = make_text()
    net(image_of(), clean=onehot_of()).reconstruction.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.codec.encoder.to_latent.parameters())


def test_frozen_codec() -> None:
    net = make_text(frozen=True).train()
    assert net.training and not any(m.training for m in net.codec.modules())
    out = net(image_of(), clean=onehot_of())
    assert out.reconstruction is None
    (out.prediction.square().mean() + out.logits.square().mean()).backward()
    assert all(p.grad is None and not p.requires_grad for p in net.codec.parameters())
    assert int(net.codec.scale.updates) == 1, "its statistics are fixed"


def test_label_leak_is_impossible_at_the_last_t() -> None:
    net = make_text(terminal_share=1.0)
    outs = []
    for clean in (onehot_of(), 1 - onehot_of()):
        torch.manual_seed(2)
        outs.append(net(image_of(), clean=clean))
    assert torch.equal(outs[0].prediction, outs[1].prediction) and not torch.equal(outs[0].target, outs[1].target)


# ------------------------------------------------------------------ image encoder
def test_last_two_levels_have_attention() -> None:
    net = make_text("2d-deep")
    assert sorted(net.encoder.attention) == ["2", "3"] and net.codec.level == 3
    assert not any(isinstance(m, SelfAttention) for m in net.codec.modules())


def test_simple_image_is_an_average() -> None:
    net = make_text(simple_image=True)
    assert not isinstance(net.encoder, LatentEncoder)
    wanted = net.encoder(nn.functional.avg_pool2d(image_of(), 2))
    torch.testing.assert_close(net.image_features(image_of()), wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_is_reached(variant: str) -> None:
    """DDP refuses parameters without gradient."""
    net = make_text("2d-resenc", **VARIANTS[variant]).train()
    out = net(image_of("2d-resenc"), clean=onehot_of("2d-resenc"))
    loss = (out.prediction - out.target).square().mean() + out.logits.square().mean()
    (loss if out.reconstruction is None else loss + out.reconstruction.square().mean()).backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
