"""The Dynamic Fusion Module against a literal implementation of section 3.4, and its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from nnunet_diffext.networks.blocks.fusion import DynamicFusion, ExpertAttention

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS = (4, 6, 8, 10)


def pyramid(dim: int, channels: tuple[int, ...], batch: int = 2, finest: int = 16) -> list[Tensor]:
    return [torch.randn(batch, c, *[finest // 2**level] * dim) for level, c in enumerate(channels)]


def make(dim: int, channels: tuple[int, ...] = CHANNELS, classes: int = 3, **kwargs: bool) -> DynamicFusion:
    torch.manual_seed(0)
    return DynamicFusion(CONV[dim], channels, classes, **kwargs)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("stages", [2, 3, 5, 6])
def test_weights_are_positive_and_sum_to_one(dim: int, stages: int) -> None:
    """At every location of every scale below full resolution, four at most."""
    channels = (4, 6, 8, 10, 12, 14)[:stages]
    finest = 32 if stages > 4 else 16
    fusion = make(dim, channels)
    de, ce = pyramid(dim, channels, 1, finest), pyramid(dim, channels, 1, finest)
    logits = torch.randn(1, 3, *[finest] * dim)
    out = fusion(de, ce, logits, logits)
    assert out.logits.shape == logits.shape
    assert [w.shape[2] for w in out.weights] == [finest // 2**s for s in range(1, min(stages - 1, 4) + 1)]
    for w, features in zip(out.weights, de[1:], strict=False):
        assert w.shape == (1, 2, *features.shape[2:])
        assert (w > 0).all()
        torch.testing.assert_close(w.sum(1), torch.ones_like(w[:, 0]))
        assert w[:, 0].std() > 1e-3, "the weights do not depend on the features"


@pytest.mark.parametrize("fuse_predictions", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
def test_equals_the_literal_fusion(dim: int, fuse_predictions: bool) -> None:
    """Eq. 1 at every scale, read out and summed; the full-resolution maps are blended by the upsampled weights.

    The module reads out before it blends and upsamples, which is cheaper and, for 1x1 convolutions, the same.
    """
    fusion = make(dim, fuse_predictions=fuse_predictions)
    de, ce = pyramid(dim, CHANNELS), pyramid(dim, CHANNELS)
    de_logits, ce_logits = torch.randn(2, 3, *[16] * dim), torch.randn(2, 3, *[16] * dim)
    mode = "bilinear" if dim == 2 else "trilinear"

    def up(x: Tensor, like: Tensor) -> Tensor:
        return interpolate(x, size=like.shape[2:], mode=mode)

    w = up(fusion.scale_weights(0, de[1], ce[1]), de[0])
    expected = fusion.seg_layers[0](w[:, [0]] * de[0] + w[:, [1]] * ce[0])
    for scale, (f_de, f_ce) in enumerate(zip(de[1:], ce[1:], strict=True)):
        s = fusion.scale_weights(scale, f_de, f_ce)
        expected = expected + fusion.seg_layers[scale + 1](up(s[:, [0]] * f_de + s[:, [1]] * f_ce, de[0]))
    if fuse_predictions:
        expected = expected + w[:, [0]] * de_logits + w[:, [1]] * ce_logits
    torch.testing.assert_close(fusion(de, ce, de_logits, ce_logits).logits, expected, atol=1e-5, rtol=1e-5)


def test_attention_equals_torchs() -> None:
    torch.manual_seed(0)
    layer = ExpertAttention(16, 4)
    tokens = torch.randn(5, 2, 16)
    q, k, v = layer.qkv(layer.norm_attention(tokens)).chunk(3, dim=-1)
    q, k, v = (x.view(5, 2, 4, 4).transpose(1, 2) for x in (q, k, v))
    mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(5, 2, 16)
    expected = tokens + layer.project(mixed)
    expected = expected + layer.mlp(layer.norm_mlp(expected))
    torch.testing.assert_close(layer(tokens), expected)


def test_weights_are_local_and_of_the_right_expert() -> None:
    """A change at one location changes the weights there and nowhere else; swapped experts swap their weights."""
    fusion = make(2)
    de, ce = pyramid(2, CHANNELS)[1], pyramid(2, CHANNELS)[1]
    w = fusion.scale_weights(0, de, ce)
    changed = de.clone()
    changed[1, :, 2, 3] += 3
    difference = (fusion.scale_weights(0, changed, ce) - w).abs().amax(1)
    assert difference[1, 2, 3] > 1e-4
    difference[1, 2, 3] = 0
    assert difference.max() < 1e-6
    fusion.project_de, fusion.project_ce = fusion.project_ce, fusion.project_de
    torch.testing.assert_close(fusion.scale_weights(0, ce, de), w.flip(1))


def test_paper_size() -> None:
    """Four heads, two layers, four scales; the difference of the sizes in Table 3 leaves 0.02 M parameters."""
    fusion = DynamicFusion(nn.Conv3d, (16, 32, 64, 128, 256), 2)
    assert len(fusion.attention) == 2 and all(layer.heads == 4 for layer in fusion.attention)
    assert len(fusion.project_de) == len(fusion.project_ce) == 4
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in fusion.named_children()}
    weighing = sizes["project_de"] + sizes["project_ce"] + sizes["attention"] + sizes["score"] + 4 * 16
    assert 18_500 <= weighing <= 21_500
    assert sum(p.numel() for p in fusion.parameters()) == weighing + sizes["seg_layers"] <= 21_500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    fusion = make(2)
    de, ce = pyramid(2, CHANNELS), pyramid(2, CHANNELS)
    reference = fusion.scale_weights(0, de[1], ce[1])
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(fusion.scale_weights(0, de[1], ce[1]), reference)
        half = fusion.scale_weights(0, de[1].to(dtype), ce[1].to(dtype))
    assert half.dtype == torch.float32
    assert (half.sum(1) - 1).abs().max() < 1e-6
