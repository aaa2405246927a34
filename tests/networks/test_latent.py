"""Cutting a planned U-Net in two at some stride, and the normalisations of latents."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op
from tiny import KINDS, Kind, make_architecture
from tiny_latent import FLAT, image_of
from torch import Tensor, nn

from nnunet_diffext.networks.blocks.norm import LatentScale, LayerNorm, standardise_sample
from nnunet_diffext.networks.latent import LatentDecoder, LatentEncoder

# stride asked for -> stage, its stride
LEVELS = [
    ("2d", 8, 1, (2, 2)),
    ("2d", 1, 0, (1, 1)),
    ("2d-resenc", 8, 1, (2, 2)),
    ("2d-deep", 8, 3, (8, 8)),
    ("2d-deep", 7, 2, (4, 4)),
    ("2d-deep", 64, 4, (16, 16)),
    ("2d-shallow", 8, 0, (1, 1)),
    ("3d", 2, 1, (2, 2, 2)),
    ("3d-aniso", 8, 1, (1, 2, 2)),
    ("3d-aniso-resenc", 1, 0, (1, 1, 1)),
]


@pytest.mark.parametrize(("kind", "stride", "level", "expected"), LEVELS)
def test_stage_of_a_stride(kind: str, stride: int, level: int, expected: tuple[int, ...]) -> None:
    """At most so many voxels per latent in every axis, and a stage below it for the U-Net."""
    architecture = make_architecture(kind)
    assert architecture.level_within(stride) == level
    assert architecture.stride_of(level) == expected


@pytest.mark.parametrize(("kind", "stride", "level", "expected"), LEVELS)
def test_rest_of_the_network(kind: str, stride: int, level: int, expected: tuple[int, ...]) -> None:
    """Starts at the resolution of the latents and ends where the whole network ends, with its widths."""
    whole = make_architecture(kind)
    before = deepcopy(dict(whole.kwargs))
    below = whole.below(level)
    assert whole.kwargs == before
    latents = torch.zeros(1, 3, *[p // s for p, s in zip(KINDS[kind].patch, expected, strict=True)])
    net, reference = below.build(3, 2), whole.build(1, 2)
    assert net(latents).shape == (1, 2, *latents.shape[2:])
    ends = [n.encoder(x)[-1] for n, x in ((net, latents), (reference, torch.zeros(1, 1, *KINDS[kind].patch)))]
    assert ends[0].shape == ends[1].shape
    assert below.features == whole.features[level:]
    assert below.strides == [(1,) * whole.dim, *whole.strides[level + 1 :]]
    assert below.kwargs["kernel_sizes"] == whole.kwargs["kernel_sizes"][level:]


@pytest.mark.parametrize(("kind", "stages"), [("2d", 3), ("3d-aniso-resenc", 3), ("2d-shallow", 2)])
def test_nothing_would_be_left(kind: str, stages: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} stages leaves none below stage {stages - 1}: use a smaller latent"):
        make_architecture(kind).below(stages - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_way_in_and_out(kind: str) -> None:
    architecture, patch = make_architecture(kind), KINDS[kind].patch
    level = architecture.level_within(8)
    encoder = LatentEncoder(architecture, 2, 5, level, attentive=2)
    decoder = LatentDecoder(architecture, 5, 3, level)
    latents = encoder(image_of(kind, channels=2))
    size = [p // s for p, s in zip(patch, architecture.stride_of(level), strict=True)]
    assert latents.shape == (2, 5, *size)
    assert encoder.features(image_of(kind, channels=2)).shape == (2, architecture.features[level], *size)
    assert sorted(encoder.attention) == sorted({str(level), str(max(0, level - 1))})
    assert decoder(latents).shape == (2, 3, *patch)
    conv = convert_dim_to_conv_op(len(patch))
    heads = [n for n, m in decoder.named_modules() if isinstance(m, conv) and m.out_channels == 3]
    assert heads == ["seg_layers.0"], "nnU-Net's -pretrained_weights skips heads by this name"


def test_encoder_is_the_planned_one() -> None:
    """Its first stages, bit for bit, so that weights can be exchanged."""
    architecture = make_architecture("3d-aniso-resenc")
    encoder, net = LatentEncoder(architecture, 1, 4, 1), architecture.build(1, 2)
    encoder.stem.load_state_dict(net.encoder.stem.state_dict())
    encoder.stages.load_state_dict(net.encoder.stages[:2].state_dict())
    image = image_of("3d-aniso-resenc")
    torch.testing.assert_close(encoder.features(image), net.encoder(image)[1])


def test_attention_sees_the_whole_image() -> None:
    """Without norms, a far corner changes nothing behind convolutions alone, but does behind attention."""
    image = image_of("2d-deep", 1)
    other = image.clone()
    other[..., :8, :8] += 1.0
    changed = []
    for attentive in (0, 2):
        torch.manual_seed(0)
        plan = make_architecture("2d-deep").with_norm(nn.Identity)
        encoder = LatentEncoder(plan, 1, 4, 2, attentive=attentive)
        with torch.no_grad():
            changed.append((encoder(image) - encoder(other)).abs()[..., -2:, -2:].max() > 0)
    assert changed == [False, True]


# ------------------------------------------------------------------ norms
def test_constant_masks_stay_distinguishable() -> None:
    """Instance norm makes the same of every constant patch, whichever class it shows; :class:`LayerNorm` does not."""
    plan = make_architecture(Kind(FLAT.patch, FLAT.strides, features=(32, 32, 32)))
    plan = replace(plan, kwargs={**plan.kwargs, "kernel_sizes": [[1, 1]] * 3})  # without padding to see at the border
    masks = [torch.tensor(onehot).view(1, 2, 1, 1).expand(1, 2, *FLAT.patch) for onehot in ((1.0, 0.0), (0.0, 1.0))]
    gaps = []
    for norm in (nn.InstanceNorm2d, LayerNorm):
        torch.manual_seed(0)
        encoder = LatentEncoder(plan.with_norm(norm), 2, 4, 1)
        with torch.no_grad():
            gaps.append(float((encoder(masks[0]) - encoder(masks[1])).abs().max()))
    assert gaps[0] < 1e-3 < 0.1 < gaps[1]


def test_layer_norm_normalises_a_sample_over_channels_and_space() -> None:
    norm, x = LayerNorm(3), 5 + 2 * image_of(channels=3) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    out = norm(x)
    assert {n: p.shape for n, p in norm.named_parameters()} == {"weight": (3,), "bias": (3,)}
    torch.testing.assert_close(out, standardise_sample(x), atol=1e-4, rtol=1e-4)
    assert out.std((0, 2, 3))[2] > 2 * out.std((0, 2, 3))[0], "the channels keep their relations"


def latents_of(batches: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.tensor([0.5, 4.0]).view(2, 1, 1), torch.tensor([-3.0, 10.0]).view(2, 1, 1)
    drift = torch.linspace(0.5, 1.5, batches)  # every batch is different
    return [d * (scale * torch.randn(3, 2, 4, 5, generator=generator) + shift) for d in drift]


def test_statistics_are_those_of_all_batches() -> None:
    scale, batches = LatentScale(2), latents_of(20)
    for batch in batches:
        scale.update(batch)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(scale.mean.double(), everything.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    variance = everything.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(scale.variance.double(), variance, atol=1e-3, rtol=1e-3)
    standard = scale.standardise(everything.float())
    assert standard.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(standard.var((0, 2, 3), unbiased=False), torch.ones(2), atol=1e-3, rtol=0)
    assert int(scale.updates) == 20


def test_statistics_follow_an_encoder_that_changes() -> None:
    scale = LatentScale(2, momentum=0.9)
    for batch in latents_of(20):
        scale.update(100 * batch)
    for _ in range(200):
        scale.update(latents_of(1)[0])
    torch.testing.assert_close(scale.mean, latents_of(1)[0].mean((0, 2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_restore_is_the_inverse(shape: tuple[int, ...]) -> None:
    scale, latents = LatentScale(3), 7 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scale.standardise(latents), latents)  # nothing is known yet
    scale.update(latents)
    standard = scale.standardise(latents.half())
    assert standard.dtype == torch.float32 and abs(standard.std() - 1) < 0.05
    torch.testing.assert_close(scale.restore(standard), latents.half().float(), atol=1e-4, rtol=1e-4)


def test_statistics_travel_with_the_weights_and_are_not_trained() -> None:
    scale, other = LatentScale(2), LatentScale(2)
    scale.update(latents_of(1)[0].requires_grad_())
    assert not list(scale.parameters()) and not scale.mean.requires_grad
    other.load_state_dict(scale.state_dict(), strict=True)
    assert torch.equal(other.std(4), scale.std(4)) and int(other.updates) == 1


def test_latents_that_never_change_stay_finite() -> None:
    scale = LatentScale(2)
    scale.update(torch.full((2, 2, 4, 4), 3.0))
    assert torch.isfinite(scale.standardise(torch.randn(2, 2, 4, 4))).all()


def test_every_sample_is_standardised_alone() -> None:
    x = 30 + 8 * image_of(batch=3, channels=4)
    out = standardise_sample(x.half())
    assert out.dtype == torch.float32
    assert out.mean((1, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(out.var((1, 2, 3), unbiased=False), torch.ones(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(standardise_sample(x[:1]), standardise_sample(x)[:1])
    torch.testing.assert_close(standardise_sample(100 * x), standardise_sample(x), atol=1e-4, rtol=1e-4)
    constant = standardise_sample(torch.full((1, 2, 3, 3), 5.0, requires_grad=True))
    assert constant.abs().max() == 0, "no division by zero"
