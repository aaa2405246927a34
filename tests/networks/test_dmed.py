"""DMED-Seg's network: one fresh map at prediction, and no label in the fused path in training."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny import KINDS, check_extreme_images, make_net, make_plans
from torch import Tensor

from nnunet_diffext.networks.dmed import DMEDNet
from nnunet_diffext.trainers import find_trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "DEonly": {"experts": "de"},
    "CEonly": {"experts": "ce"},
    "fixedAverage": {"fusion": "average"},
    "featuresOnly": {"fuse_predictions": False},
    "halfDE": {"full_resolution_de": False},
    "halfDE-fixedAverage": {"full_resolution_de": False, "fusion": "average"},
    "halfDE-DEonly": {"full_resolution_de": False, "experts": "de"},
}


def image_of(kind: str, batch: int = 2, channels: int = 1) -> Tensor:
    return torch.randn(batch, channels, *KINDS[kind].patch, generator=torch.Generator().manual_seed(1))


def onehot_of(kind: str, batch: int = 2, heads: int = 2, seed: int = 2) -> Tensor:
    shape = (batch, *KINDS[kind].patch)
    labels = torch.randint(heads, shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(labels, heads).movedim(-1, 1).float().contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["2d", "3d-aniso-resenc"])
def test_prediction_is_one_fresh_finite_map(kind: str, variant: str) -> None:
    net = make_net(kind, heads=3, channels=2, **VARIANTS[variant]).eval()
    image = image_of(kind, channels=2)
    before = image.clone()
    with torch.inference_mode():
        out = net(image)
        assert type(out) is Tensor and out.dtype == torch.float32
        assert out.shape == (2, 3, *KINDS[kind].patch)
        assert torch.isfinite(out).all() and out.abs().max() < 800
        first = out.clone()
        out.fill_(torch.nan)  # nnU-Net adds the mirrored passes in place
        assert torch.equal(image, before)
        assert torch.equal(net(image), first), "prediction is not bit-identical, or was spoiled by its earlier result"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_plan(kind: str, channels: int) -> None:
    net = make_net(kind, channels=channels).eval()
    with torch.no_grad():
        assert net(image_of(kind, 1, channels)).shape == (1, 2, *KINDS[kind].patch)


def test_other_patch_sizes_and_back() -> None:
    """nnU-Net may predict with another tile size; what is kept for one size must not leak into the next."""
    net = make_net("2d").eval()
    small, large = torch.randn(1, 1, 16, 24), torch.randn(1, 1, 32, 8)
    with torch.no_grad():
        first = net(small)
        assert net(large).shape == (1, 2, 32, 8)
        assert torch.equal(net(small), first)


def test_gradients_after_inference_mode() -> None:
    """What prediction keeps must be usable outside of inference mode, for instance for saliency maps."""
    net = make_net("2d").eval()
    image = image_of("2d")
    with torch.inference_mode():
        net(image)
    image.requires_grad_()
    net(image).sum().backward()
    assert image.grad.abs().max() > 0


def test_extreme_images_stay_finite() -> None:
    net = make_net("3d").eval()
    check_extreme_images(net, image_of("3d", 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_prediction_leaves_the_global_random_state_alone(variant: str) -> None:
    net = make_net("2d", **VARIANTS[variant]).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        net(image_of("2d"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_noise_of_prediction_is_the_same_for_every_tile_and_mirror_pass(kind: str) -> None:
    net = make_net(kind, heads=3)
    noise = net.inference_noise(image_of(kind))
    spatial = range(2, noise.ndim)
    assert noise.shape == (2, 3, *KINDS[kind].patch)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise, net.inference_noise(image_of(kind) + 1))
    for axis in spatial:
        assert torch.equal(noise.flip(axis), noise)
    assert torch.equal(noise.flip(list(spatial)), noise)
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
    other = make_net(kind, heads=3, noise_seed=1).inference_noise(image_of(kind))
    assert (other - noise).abs().mean() > 0.5


@pytest.mark.parametrize("kind", ["2d", "3d"])
def test_mirrored_image_sees_mirrored_noise(kind: str) -> None:
    """The expert's input for a flipped image is the flipped input, so that mirror passes differ by the image alone."""
    net = make_net(kind).eval()
    inputs: list[Tensor] = []
    net.de.encoder[0].register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    image = image_of(kind)
    with torch.no_grad():
        net(image)
        net(image.flip(2))
    assert torch.equal(inputs[1], inputs[0].flip(2))


def test_prediction_sees_pure_noise_at_the_last_timestep() -> None:
    net = make_net("2d").eval()
    seen: list[tuple[Tensor, ...]] = []
    net.de.register_forward_hook(lambda _, args, __: seen.append(args))
    image = image_of("2d")
    with torch.no_grad():
        net(image)
    ((seen_image, mask, t),) = seen
    assert torch.equal(seen_image, image)
    assert torch.equal(mask, net.inference_noise(image))
    assert t.tolist() == [999, 999]


def passes(net: DMEDNet) -> Counter[str]:
    """Counts the forward passes of each expert from now on."""
    counts: Counter[str] = Counter()
    for name in ("de", "ce"):
        if getattr(net, name) is not None:
            getattr(net, name).register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("default", (1, 1)), ("fixedAverage", (1, 1)), ("halfDE", (1, 1)), ("DEonly", (1, 0)), ("CEonly", (0, 1))],
)
def test_one_pass_of_each_expert_at_prediction(variant: str, expected: tuple[int, int]) -> None:
    net = make_net("2d", **VARIANTS[variant]).eval()
    counts = passes(net)
    with torch.no_grad():
        net(image_of("2d"))
    assert (counts["de"], counts["ce"]) == expected


@pytest.mark.parametrize(
    ("clean", "recycle", "expected"), [(False, False, (1, 1)), (True, False, (2, 1)), (True, True, (3, 1))]
)
def test_passes_in_training(clean: bool, recycle: bool, expected: tuple[int, int]) -> None:
    net = make_net("2d")
    counts = passes(net)
    target = {"clean": onehot_of("2d"), "clean_image": image_of("2d")} if clean else {}
    out = net(image_of("2d"), recycle=recycle, **target)
    assert (counts["de"], counts["ce"]) == expected
    assert (out.denoised is not None) == clean


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("variant", ["fixedAverage", "halfDE-fixedAverage"])
def test_fixed_average_is_the_mean_of_the_probabilities(variant: str, regions: bool) -> None:
    net = make_net("2d", heads=3, regions=regions, **VARIANTS[variant])
    out = net(image_of("2d"))
    squash = torch.sigmoid if regions else (lambda x: x.softmax(1))
    torch.testing.assert_close(squash(out.fused), (squash(out.de) + squash(out.ce)) / 2)
    assert (squash(out.de) - squash(out.ce)).abs().max() > 0.01
    assert out.weights == []


def test_training_output() -> None:
    net = make_net("3d", heads=3)
    out = net(image_of("3d"), clean=onehot_of("3d", 1, 3), clean_image=image_of("3d", 1))
    full = (2, 3, *KINDS["3d"].patch)
    assert out.fused.shape == out.de.shape == out.ce.shape == full
    assert out.denoised.shape == (1, *full[1:])
    assert [w.shape[2:] for w in out.weights] == [(4, 6, 8), (2, 3, 4)]
    assert [e.shape for e in out.embeddings] == [(2, 128, 2, 3, 4)] * 2
    assert not torch.equal(net(image_of("3d")).de, out.de), "training draws new noise in every step"


@pytest.mark.parametrize("variant", ["default", "halfDE"])
def test_deep_network_has_four_scales(variant: str) -> None:
    net = make_net("2d-deep", **VARIANTS[variant])
    out = net(image_of("2d-deep"))
    assert [w.shape[-1] for w in out.weights] == [32, 16, 8, 4]


@pytest.mark.parametrize(("experts", "absent"), [("de", "ce"), ("ce", "de")])
def test_single_expert(experts: str, absent: str) -> None:
    net = make_net("2d", experts=experts)
    out = net(image_of("2d"), clean=onehot_of("2d"), clean_image=image_of("2d"), leaky=onehot_of("2d"))
    assert getattr(net, absent) is None and net.fusion is None and net.project is None
    assert getattr(out, absent) is None
    assert out.fused is getattr(out, experts)
    assert (out.denoised is not None) == (experts == "de")


# ------------------------------------------------------------------ where the label may go
def same_draws(net: DMEDNet, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return net(image_of("2d"), **kwargs)


def test_label_reaches_the_diffusion_pass_only() -> None:
    """With equal random draws the fused path is bit-identical whatever the label is."""
    net = make_net("2d")
    a, b = (same_draws(net, clean=onehot_of("2d", seed=s), clean_image=image_of("2d")) for s in (1, 2))
    assert torch.equal(a.fused, b.fused) and torch.equal(a.de, b.de) and torch.equal(a.ce, b.ce)
    assert (a.denoised - b.denoised).abs().max() > 1e-4


def test_recycling_never_sees_the_label() -> None:
    net = make_net("2d")
    kwargs = {"clean_image": image_of("2d"), "recycle": True}
    a, b = (same_draws(net, clean=onehot_of("2d", seed=s), **kwargs) for s in (1, 2))
    assert torch.equal(a.denoised, b.denoised)


def test_leaky_control_puts_the_label_into_the_fused_path() -> None:
    net = make_net("2d")
    a, b = (same_draws(net, leaky=onehot_of("2d", seed=s)) for s in (1, 2))
    assert (a.fused - b.fused).abs().max() > 1e-4
    assert torch.equal(a.ce, b.ce)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_noised_masks(scale: float) -> None:
    """``y_t = sqrt(abar) b (2 y - 1) + sqrt(1 - abar) eps`` with the cosine schedule's abar, written out."""
    net = make_net("2d", target_scale=scale)
    onehot = onehot_of("2d", 64)
    torch.manual_seed(3)
    t, noisy = net.noised(onehot)
    torch.manual_seed(3)
    expected_t = torch.randint(1000, (64,))
    eps = torch.randn(onehot.shape)
    assert torch.equal(t, expected_t) and t.min() < 100 and t.max() > 900
    s = 0.008

    def cos2(u: Tensor) -> Tensor:
        return ((u + s) / (1 + s) * math.pi / 2).cos() ** 2

    abar = (cos2((t.double() + 1) / 1000) / cos2(torch.zeros(1, dtype=torch.float64))).float().view(-1, 1, 1, 1)
    keep = t < 998  # beta is clipped in the very last steps
    expected = abar.sqrt() * scale * (2 * onehot - 1) + (1 - abar).sqrt() * eps
    torch.testing.assert_close(noisy[keep], expected[keep], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ as nnU-Net builds it
@pytest.mark.parametrize("tokens", ["", "_CEonly", "_DEonly", "_fixedAverage", "_halfDE", "_IEFA"])
@pytest.mark.parametrize("kind", ["2d", "3d-aniso", "3d-aniso-resenc"])
def test_state_dict_does_not_depend_on_deep_supervision(kind: str, tokens: str) -> None:
    trainer = find_trainer(f"DMEDSegTrainer{tokens}")
    plans = make_plans(kind)
    plans["diffext"] = {
        "DMEDSegTrainer": trainer.Settings(**trainer.overrides).as_dict(),
        "label_space": {"num_heads": 3, "regions": False, "ignore_label": None},
    }
    manager = PlansManager(plans)
    configuration = manager.get_configuration(KINDS[kind].configuration)
    arguments = (manager, configuration, 2, 3)
    on, off = (trainer.build_network_architecture(*arguments, enable_deep_supervision=d).eval() for d in (True, False))
    assert type(on) is type(off) is DMEDNet
    off.load_state_dict(on.state_dict(), strict=True)
    image = image_of(kind, channels=2)
    with torch.no_grad():
        a, b = on(image), off(image)
    assert type(a) is Tensor and torch.equal(a, b)
    # one head per expert: coarser ones would be left-overs of deep supervision, without gradient
    conv = convert_dim_to_conv_op(KINDS[kind].dim)
    heads = {n for n, m in on.named_modules() if isinstance(m, conv) and m.out_channels == 3}
    assert all(".seg_layers." in n for n in heads), "nnU-Net's -pretrained_weights skips heads by this name"
    assert len([n for n in heads if n.startswith(("de.", "ce."))]) == (on.de is not None) + (on.ce is not None)


def test_plans_without_our_block_are_refused() -> None:
    """For instance the preprocessed folder's plans instead of the model folder's."""
    manager = PlansManager(make_plans("2d"))
    with pytest.raises(ValueError, match="no 'diffext.label_space' block.*model folder"):
        find_trainer("DMEDSegTrainer").build_network_architecture(manager, manager.get_configuration("2d"), 1, 2)
