"""Attention of voxels to text and to each other (TextDiffSeg, eq. 2; METHODS 3.5-1)."""

from __future__ import annotations

import pytest
import torch
from tiny_latent import image_of
from torch import Tensor, nn

from nnunet_diffext.networks.blocks import attention
from nnunet_diffext.networks.blocks.attention import SelfAttention, TextAttention, TextConcatenation

FUSIONS = (TextAttention, TextConcatenation)
SHAPES = [(2, 32, 6, 10), (2, 32, 4, 6, 5)]


def make(kind: type[nn.Module], ndim: int = 4, width: int = 8, channels: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return kind(nn.Conv3d if ndim == 5 else nn.Conv2d, channels, width)


def features(shape: tuple[int, ...] = SHAPES[0], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(tokens: int = 5, batch: int = 2, width: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens, the last two of which are padding if there are more than three."""
    states = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(tokens).expand(batch, -1) < max(1, tokens - 2)
    return states, mask


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_vary_over_space_and_sum_to_one(shape: tuple[int, ...]) -> None:
    module, x, (tokens, mask) = make(TextAttention, len(shape)), features(shape), text()
    weights = module.weights(x, tokens, mask)
    assert weights.shape == (2, 5, *shape[2:])
    torch.testing.assert_close(weights.sum(1), torch.ones(2, *shape[2:]))
    assert weights[:, 3:].abs().max() == 0, "padding"
    assert weights[:, :3].flatten(2).std(2).min() > 1e-2
    assert (weights[:, :3] - 1 / 3).abs().max() > 0.05


def test_weights_are_those_of_the_forward_pass() -> None:
    """Written out for one head: ``x + W_o sum_l w_l W_v z_l``."""
    module, x, (tokens, mask) = make(TextAttention, channels=8), features((2, 8, 6, 10)), text()
    assert module.heads == 1
    mixed = torch.einsum("blhw,blc->bchw", module.weights(x, tokens, mask), module.value(tokens))
    torch.testing.assert_close(module(x, tokens, mask), x + module.out(mixed), atol=1e-5, rtol=1e-5)


def test_weights_are_a_softmax_over_scaled_products() -> None:
    module, x, (tokens, mask) = make(TextAttention, channels=8), features((2, 8, 6, 10)), text(3)
    mask = torch.ones_like(mask)
    q, k = module.query(module.norm(x)), module.key(tokens)
    wanted = (torch.einsum("bchw,blc->blhw", q, k) / 8**0.5).softmax(1)
    torch.testing.assert_close(module.weights(x, tokens, mask), wanted)


def test_one_vector_for_the_text_says_the_same_everywhere() -> None:
    """The softmax over a single key is 1: eq. 1 and 2 at their word add a constant."""
    module, x, (tokens, mask) = make(TextAttention), features(), text(1)
    assert torch.equal(module.weights(x, tokens, mask), torch.ones(2, 1, 6, 10))
    added = module(x, tokens, mask) - x
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), atol=1e-5, rtol=1e-5)
    assert added.abs().max() > 1e-2


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_nothing(shape: tuple[int, ...], fusion: type[nn.Module]) -> None:
    module, x, (tokens, mask) = make(fusion, len(shape)), features(shape), text()
    out = module(x, tokens, mask)
    assert out.shape == x.shape
    short = module(x, tokens[:, :3], mask[:, :3])
    torch.testing.assert_close(out, short, atol=1e-5, rtol=1e-5)
    other = tokens.clone()
    other[:, 3:] = 100.0
    assert torch.equal(module(x, other, mask), out)
    other[:, 2] = 100.0
    assert (module(x, other, mask) - out).abs().max() > 1e-2, "a word, not padding"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_order_of_the_words_does_not_matter_but_the_words_do(fusion: type[nn.Module]) -> None:
    """Positions are in BERT's states already."""
    module, x, (tokens, _) = make(fusion), features(), text()
    mask = torch.ones(2, 5, dtype=torch.bool)
    out = module(x, tokens, mask)
    torch.testing.assert_close(module(x, tokens.flip(1), mask), out, atol=1e-5, rtol=1e-5)
    assert (module(x, -tokens, mask) - out).abs().max() > 1e-2


def test_concatenation_says_the_same_everywhere() -> None:
    """Ablation zeta_1 is the mean token as further channels of every voxel."""
    module, x, (tokens, mask) = make(TextConcatenation), features(), text()
    mean = module.project(tokens[:, :3].mean(1))
    wanted = module.merge(torch.cat([x, mean[:, :, None, None].expand_as(x)], 1))
    torch.testing.assert_close(module(x, tokens, mask), wanted)


# ------------------------------------------------------------------ voxels to voxels
def self_attention(ndim: int = 4, channels: int = 32) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(nn.Conv3d if ndim == 5 else nn.Conv2d, channels)


@pytest.mark.parametrize("shape", SHAPES)
def test_self_attention_keeps_the_shape_and_moves_with_the_voxels(shape: tuple[int, ...]) -> None:
    """It knows no positions: mirroring before is mirroring behind."""
    module, x = self_attention(len(shape)), features(shape)
    out = module(x)
    assert out.shape == x.shape and (out - x).abs().max() > 1e-2
    torch.testing.assert_close(module(x.flip(2)), out.flip(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x[:1]), out[:1], atol=1e-5, rtol=1e-5)


def test_long_axes_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of attention grows with voxels times keys."""
    keys: list[int] = []
    module = self_attention()
    module.key.register_forward_hook(lambda _, args, __: keys.append(args[0].shape[1]))
    x = features()
    exact = module(x)
    assert keys == [60]
    monkeypatch.setattr(attention, "MAX_KEYS", 30)
    pooled = module(x)
    assert keys == [60, 30]
    assert pooled.shape == x.shape and not torch.equal(pooled, exact)
    assert attention._at_most(torch.Size((3, 40, 41)), 512) == [3, 10, 11]
    assert attention._at_most(torch.Size((8, 8, 8)), 512) == [8, 8, 8]


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (32, 2), (40, 2), (36, 2), (35, 1), (320, 20)])
def test_heads_divide_the_channels(channels: int, heads: int) -> None:
    module = self_attention(channels=channels)
    assert module.heads == heads and channels % heads == 0
    assert module(image_of(channels=channels)).shape[1] == channels


def test_float32_inside_of_autocast() -> None:
    """Sums over thousands of tokens overflow in half precision."""
    x, (tokens, mask) = features(), text()
    attend, look = make(TextAttention), self_attention()
    with torch.autocast("cpu", torch.bfloat16):
        outs = attend(x.bfloat16(), tokens, mask), look(x.bfloat16())
    rounded = x.bfloat16().float()
    assert torch.equal(outs[0], attend(rounded, tokens, mask)) and torch.equal(outs[1], look(rounded))
