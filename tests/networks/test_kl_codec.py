"""Masks as colours for a pretrained image autoencoder: the code, its limits, and images as it sees them."""

from __future__ import annotations

import pytest
import torch
from tiny_latent import FLAT, image_of, make_architecture, onehot_of
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.kl_codec import KLCodec, RGBEncoder
from nnunet_diffext.networks.leaf import LEAFNet


def make_codec(heads: int, regions: bool = False, **options: object) -> KLCodec:
    from tiny_models import make_autoencoder

    model = make_autoencoder(**options).eval().requires_grad_(False)
    return KLCodec(model, LabelSpace(heads, regions), channels=2, stride=(2, 2), level=1)


def regions_of(heads: int) -> Tensor:
    """Overlapping masks."""
    return (image_of(channels=heads, seed=4) > 0).float()


# ------------------------------------------------------------------ colours
@pytest.mark.parametrize("heads", range(2, 9))
def test_every_class_has_a_colour_of_its_own(heads: int) -> None:
    codec, masks = make_codec(heads), onehot_of(heads=heads)
    rgb = codec.paint(masks)
    assert rgb.shape == (2, 3, *FLAT.patch) and set(rgb.unique().tolist()) <= {-1.0, 1.0}
    assert len(rgb.movedim(1, -1).reshape(-1, 3).unique(dim=0)) == heads
    logits = codec.read(rgb)
    assert torch.equal(logits.argmax(1), masks.argmax(1))
    assert (logits.softmax(1) * masks).sum(1).min() > 0.99
    assert torch.equal(logits.amax(1), torch.zeros(2, *FLAT.patch)), "-distance^2"


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_region_has_a_channel_of_its_own(heads: int) -> None:
    codec, masks = make_codec(heads, regions=True), regions_of(heads)
    rgb = codec.paint(masks)
    assert rgb.shape == (2, 3, *FLAT.patch)
    assert torch.equal((rgb[:, :heads] + 1) / 2, masks) and (rgb[:, heads:] == -1).all()
    p = codec.read(rgb).sigmoid()
    assert torch.equal(p > 0.5, masks > 0.5) and (p - masks).abs().max() < 1e-3


@pytest.mark.parametrize("heads", [2, 8])
def test_colours_survive_errors_of_the_autoencoder(heads: int) -> None:
    """Up to half the way to the next colour; half precision reads like float32."""
    codec, masks = make_codec(heads), onehot_of(heads=heads)
    rgb = codec.paint(masks) + 0.9 * (2 * torch.rand(2, 3, *FLAT.patch, generator=torch.Generator().manual_seed(0)) - 1)
    assert torch.equal(codec.read(rgb).argmax(1), masks.argmax(1))
    assert codec.read(rgb.half()).dtype == torch.float32
    gray = codec.read(torch.zeros(1, 3, 2, 2)).softmax(1)
    torch.testing.assert_close(gray, torch.full_like(gray, 1 / heads))


def test_ignored_voxels_are_black() -> None:
    """They are of no class in a one-hot mask, and show the colour of the first one."""
    masks = onehot_of(heads=3)
    masks[:, :, :4] = 0
    assert (make_codec(3).paint(masks)[:, :, :4] == -1).all()
    assert (make_codec(3, regions=True).paint(masks)[:, :, :4] == -1).all()


@pytest.mark.parametrize(("heads", "regions", "limit"), [(9, False, "8 classes"), (4, True, "3 regions")])
def test_too_many_for_colours(heads: int, regions: bool, limit: str) -> None:
    with pytest.raises(ValueError, match=f"Colours tell {limit} apart, this dataset has {heads}. .*MaskAutoencoder"):
        make_codec(heads, regions)


# ------------------------------------------------------------------ latents
def test_latents_are_the_modes_of_the_autoencoder() -> None:
    codec, masks = make_codec(3), onehot_of(heads=3)
    with torch.no_grad():
        raw = codec.raw_latents(masks)
        assert torch.equal(raw, codec.autoencoder.encode(codec.paint(masks)).latent_dist.mode())
        codec.scale.update(raw)
        z = codec.encode(masks)
        assert z.shape == (2, 2, 8, 12)
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.var((0, 2, 3), unbiased=False), torch.ones(2), atol=1e-3, rtol=0)
        torch.testing.assert_close(codec.decode(z), codec.read(codec.autoencoder.decode(raw).sample), atol=1e-3, rtol=0)


def test_colours_are_not_in_the_weights() -> None:
    codec = make_codec(3)
    assert {k.split(".")[0] for k in codec.state_dict()} == {"autoencoder", "scale"}
    assert codec.corners.shape == (3, 3)


# ------------------------------------------------------------------ images
@pytest.mark.parametrize(("channels", "order"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_as_the_encoder_sees_them(channels: int, order: list[int]) -> None:
    encoder = make_codec(2).image_encoder()
    seen: list[Tensor] = []
    encoder.encoder.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    image = 2 * image_of(channels=channels)
    assert encoder(image).shape == (2, 2, 8, 12)
    torch.testing.assert_close(seen[0], (image[:, order] / 3).clamp(-1, 1))
    assert seen[0].abs().max() == 1


@pytest.mark.parametrize("quant", [True, False])
def test_image_encoder_is_a_trainable_copy(quant: bool) -> None:
    """On a picture within [-1, 1] it does what the autoencoder does."""
    codec = make_codec(2, use_quant_conv=quant)
    encoder, picture = codec.image_encoder(), image_of(channels=3).clamp(-1, 1)
    assert isinstance(encoder, RGBEncoder) and all(p.requires_grad for p in encoder.parameters())
    torch.testing.assert_close(encoder(3 * picture), codec.autoencoder.encode(picture).latent_dist.mode())
    encoder(picture).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert not any(p.requires_grad for p in codec.parameters())


def leaf(codec: KLCodec) -> LEAFNet:
    return LEAFNet(codec, make_architecture(FLAT), 1, codec.label_space)


def test_leaf_around_it() -> None:
    """The paper's: image encoder and mask encoder are copies, with latents of the same width."""
    net = leaf(make_codec(3))
    assert isinstance(net.encoder, RGBEncoder) and net.known(image_of()).shape == (2, 2, 8, 12)
    out = net.train()(image_of(), clean=onehot_of(heads=3))
    out.prediction.square().mean().backward()
    assert all(p.grad is None for p in net.codec.parameters())
    assert net.eval()(image_of()).shape == (2, 3, *FLAT.patch)


def test_image_encoder_starts_from_weights_that_were_loaded_later() -> None:
    """When a network is built, the autoencoder's weights are not there yet."""
    net, pretrained = leaf(make_codec(3)), make_codec(3)
    for p in pretrained.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    net.codec.load_state_dict(pretrained.state_dict())
    picture = image_of(channels=3).clamp(-1, 1)
    wanted = pretrained.autoencoder.encode(picture).latent_dist.mode()
    assert (net.encoder(3 * picture) - wanted).abs().max() > 1e-2
    assert net.start_from_codec() == len(net.encoder.state_dict())
    torch.testing.assert_close(net.encoder(3 * picture), wanted)
    assert all(p.requires_grad for p in net.encoder.parameters())
