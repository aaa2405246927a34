"""The autoencoder of masks: shapes, standardised latents, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny import KINDS, make_architecture
from tiny_latent import FLAT, image_of, make_codec, onehot_of

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.mask_autoencoder import MaskAutoencoder


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan(kind: str, regions: bool) -> None:
    codec = make_codec(kind, heads=3, regions=regions, channels=5)
    masks = onehot_of(kind, heads=3)
    with torch.no_grad():
        latents = codec.encode(masks)
        assert latents.shape == (2, 5, *[p // s for p, s in zip(KINDS[kind].patch, codec.stride, strict=True)])
        assert latents.dtype == torch.float32
        assert codec.decode(latents).shape == (2, 3, *KINDS[kind].patch)
        torch.testing.assert_close(codec(masks.bool()), codec.decode(latents), atol=1e-4, rtol=1e-4)
    out = codec.train()(masks.bool())
    assert out.logits.shape == (2, 3, *KINDS[kind].patch) and out.latents.shape == latents.shape


@pytest.mark.parametrize(("stride", "expected"), [(8, (2, 2)), (2, (2, 2)), (1, (1, 1))])
def test_stride_and_channels(stride: int, expected: tuple[int, int]) -> None:
    codec = make_codec(FLAT, stride=stride, channels=3)
    assert codec.stride == expected and codec.channels == 3
    assert codec.encode(onehot_of()).shape == (2, 3, 16 // expected[0], 24 // expected[1])


def test_latents_are_standardised_over_the_masks_seen_in_training() -> None:
    torch.manual_seed(0)
    codec = MaskAutoencoder(make_architecture(FLAT), LabelSpace(2))
    batches = [onehot_of(heads=2, seed=seed) for seed in range(8)]
    with torch.no_grad():
        for batch in batches:
            codec.train()(batch.bool())
        codec.eval()
        latents = torch.cat([codec.encode(batch) for batch in batches])
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(4), atol=2e-2, rtol=0)
    raw = torch.cat([codec.encoder(batch) for batch in batches])
    assert (raw.var((0, 2, 3)) - 1).abs().max() > 0.2, "they would be so by themselves: the test shows nothing"


def test_prediction_does_not_change_the_statistics() -> None:
    codec = make_codec()
    before = codec.scale.mean.clone()
    codec(onehot_of(seed=9).bool())
    codec.encode(onehot_of(seed=9))
    assert torch.equal(codec.scale.mean, before) and int(codec.scale.updates) == 1


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_on_what_the_decoder_learns_from(noise: float) -> None:
    """Relative to the spread of the latents."""
    codec = make_codec(noise=noise).train()
    seen: list[torch.Tensor] = []
    codec.decoder.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    masks = onehot_of(batch=64).bool()
    for _ in range(60):  # so that the statistics are those of this batch
        out = codec(masks)
    added = seen[-1] - out.latents.detach()
    spread = out.latents.detach().std((0, 2, 3))
    torch.testing.assert_close(added.std((0, 2, 3)), noise * spread, atol=1e-6, rtol=0.1)
    first, second = codec(masks).logits, codec(masks).logits
    assert torch.equal(first, second) == (noise == 0)


def test_images_are_refused() -> None:
    """As nnU-Net's predictor would show them."""
    codec = make_codec()
    for image in (image_of(channels=2), onehot_of(), onehot_of().short()):
        with pytest.raises(TypeError, match="cannot segment an image. .* -tr LEAFTrainer, and predict"):
            codec(image)


def test_masks_of_a_batch_do_not_mix() -> None:
    codec, masks = make_codec(), onehot_of(batch=3)
    torch.testing.assert_close(codec.encode(masks)[1:2], codec.encode(masks[1:2]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec(masks.bool())[1:2], codec(masks[1:2].bool()), atol=1e-4, rtol=1e-4)


def test_decoder_is_as_small_as_asked_for() -> None:
    """Only masks pass through it; the encoder is the planned one, whatever the decoder's width."""

    def sizes(width: float) -> tuple[int, int]:
        codec = make_codec("2d-resenc", width=width)
        return tuple(sum(p.numel() for p in part.parameters()) for part in (codec.encoder, codec.decoder))

    (encoder, narrow), (same, wide) = sizes(0.5), sizes(1.0)
    assert encoder == same and 3 * narrow < wide + encoder and narrow < 0.5 * wide
