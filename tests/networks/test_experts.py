"""The two backbones: V-Net's residuals, and a U-Net that listens to image, noisy mask and time."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, make_architecture
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from nnunet_diffext.networks.blocks.time import FiLM, TimeEmbedding
from nnunet_diffext.networks.unet import ConditionalUNet, VNet

PLAIN = [k for k, spec in KINDS.items() if not spec.residual]
RESIDUAL = [k for k, spec in KINDS.items() if spec.residual]


def stage_input(net: VNet, kind: str, level: int) -> Tensor:
    """A random input of encoder stage ``level``."""
    spec = KINDS[kind]
    size = list(spec.patch)
    for stride in spec.strides[:level]:
        size = [p // s for p, s in zip(size, stride, strict=True)]
    return torch.randn(2, 1 if level == 0 else spec.features[level - 1], *size)


@pytest.mark.parametrize("kind", PLAIN)
def test_vnet_stage_is_the_identity_behind_its_first_convolution(kind: str) -> None:
    """With all later convolutions at zero a stage returns what its first one gives; a plain U-Net would return zero."""
    torch.manual_seed(0)
    net = VNet(make_architecture(kind), 1, 2)
    stages = [stage[-1] for stage in net.encoder] + list(net.decoder)
    for stage in stages:
        for later in stage.convs[1:]:
            for p in later.parameters():
                nn.init.zeros_(p)
    for level, stage in enumerate(net.encoder):
        x = stage_input(net, kind, level)
        first = stage[-1].convs[0](x)
        assert len(stage[-1].convs) > 1 and first.abs().max() > 0
        assert torch.equal(net.encoder_stage(level, x, None), first)
        assert stage(x).abs().max() == 0
    for index, stage in enumerate(net.decoder):
        x = torch.randn(2, stage.convs[0].input_channels, *KINDS[kind].patch)
        assert torch.equal(net.decoder_stage(index, x, None), stage.convs[0](x))


@pytest.mark.parametrize("kind", PLAIN)
def test_vnet_adds_the_later_convolutions(kind: str) -> None:
    net = VNet(make_architecture(kind), 1, 2)
    x = stage_input(net, kind, 1)
    first, second = net.encoder[1][-1].convs
    torch.testing.assert_close(net.encoder_stage(1, x, None), first(x) + second(first(x)))


@pytest.mark.parametrize("kind", RESIDUAL)
def test_vnet_takes_residual_stages_as_they_are(kind: str) -> None:
    net = VNet(make_architecture(kind), 1, 2)
    x = net.stem(torch.randn(2, 1, *KINDS[kind].patch))
    for level, stage in enumerate(net.encoder):
        assert torch.equal(net.encoder_stage(level, x, None), stage(x))
        x = stage(x)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_vnet_pools_if_the_plan_does(pool: str) -> None:
    """A stage that begins with pooling: the shortcut starts behind it."""
    net = VNet(make_architecture("2d"), 1, 2)
    pooling = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
    convolutions = net.encoder[0][-1]
    net.encoder[0] = nn.Sequential(pooling, convolutions)
    x = torch.randn(1, 1, 8, 8)
    first = convolutions.convs[0](pooling(x))
    torch.testing.assert_close(net.encoder_stage(0, x, None), first + convolutions.convs[1](first))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_both_experts(kind: str) -> None:
    """Logits at full resolution; features of every level, finest first, with the planned channels."""
    spec = KINDS[kind]
    image, mask = torch.randn(2, 3, *spec.patch), torch.randn(2, 4, *spec.patch)
    outputs = (
        VNet(make_architecture(kind), 3, 4)(image),
        ConditionalUNet(make_architecture(kind), 3, 4, 4)(image, mask, torch.tensor([0, 999])),
    )
    for out in outputs:
        assert out.logits.shape == (2, 4, *spec.patch)
        size, shapes = list(spec.patch), []
        for channels, stride in zip(spec.features, spec.strides, strict=True):
            size = [p // s for p, s in zip(size, stride, strict=True)]
            shapes.append((2, channels, *size))
        assert [tuple(f.shape) for f in out.features] == shapes


@pytest.mark.parametrize("kind", ["2d", "3d-aniso-resenc"])
def test_conditional_unet_listens_to_everything(kind: str) -> None:
    """Each of image, noisy mask and time changes the logits, and no sample sees another sample's condition."""
    torch.manual_seed(0)
    spec = KINDS[kind]
    net = ConditionalUNet(make_architecture(kind), 1, 2, 2).eval()
    image, mask, t = torch.randn(2, 1, *spec.patch), torch.randn(2, 2, *spec.patch), torch.tensor([500, 500])

    def logits(image: Tensor = image, mask: Tensor = mask, t: Tensor = t) -> Tensor:
        with torch.no_grad():
            return net(image, mask, t).logits

    reference = logits()
    other_image, other_mask, other_t = image.clone(), mask.clone(), torch.tensor([501, 500])
    other_image[0] += torch.randn(image.shape[1:])
    other_mask[0] += torch.randn(mask.shape[1:])
    for changed in (logits(image=other_image), logits(mask=other_mask), logits(t=torch.tensor([100, 500]))):
        assert (changed[0] - reference[0]).abs().max() > 1e-3
        torch.testing.assert_close(changed[1], reference[1])
    assert (logits(t=other_t)[0] - reference[0]).abs().max() > 1e-6  # neighbouring steps differ as well


def test_every_stage_is_modulated() -> None:
    """One FiLM per encoder and decoder stage, of that stage's width; each of them changes the result."""
    torch.manual_seed(0)
    net = ConditionalUNet(make_architecture("3d"), 1, 2, 2).eval()
    widths = [film.to_scale_shift.out_features // 2 for film in (*net.encoder_films, *net.decoder_films)]
    assert widths == [8, 16, 32, 16, 8]
    image, mask, t = torch.randn(1, 1, 8, 12, 16), torch.randn(1, 2, 8, 12, 16), torch.tensor([300])
    with torch.no_grad():
        reference = net(image, mask, t).logits
        for film in (*net.encoder_films, *net.decoder_films):
            weight = film.to_scale_shift.weight.clone()
            film.to_scale_shift.weight.zero_()
            assert (net(image, mask, t).logits - reference).abs().max() > 1e-5
            film.to_scale_shift.weight.copy_(weight)


def test_film_by_hand() -> None:
    film = FiLM(4, 2)
    nn.init.zeros_(film.to_scale_shift.weight)
    with torch.no_grad():
        film.to_scale_shift.bias.copy_(torch.tensor([1.0, -3.0, 0.5, 0.25]))
    h = torch.tensor([[[1.0, -1.0], [1.0, 2.0]]])[..., None]
    expected = leaky_relu(torch.tensor([[[2.5, -1.5], [-1.75, -3.75]]])[..., None], 0.01)
    torch.testing.assert_close(film(h, torch.randn(1, 4)), expected)


def test_time_embedding() -> None:
    """The sinusoidal code of Vaswani et al. before the MLP: unit norm per frequency, all timesteps distinct."""
    embedding = TimeEmbedding(8)
    embedding.mlp = nn.Identity()
    t = torch.arange(1000)
    code = embedding(t)
    k = torch.arange(4)
    torch.testing.assert_close(code[7], torch.cat([(7 * 10_000 ** (-k / 4)).sin(), (7 * 10_000 ** (-k / 4)).cos()]))
    torch.testing.assert_close(code[:, :4] ** 2 + code[:, 4:] ** 2, torch.ones(1000, 4))
    assert torch.cdist(code, code).fill_diagonal_(1).min() > 1e-3
    assert not TimeEmbedding(8).state_dict().keys() & {"frequencies"}
