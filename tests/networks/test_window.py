"""Windows, their attention, and the patches between resolutions, against timm (2D) and MONAI (3D)."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import swin_unetr
from timm.models import swin_transformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nnunet_diffext.networks.blocks.experts import MLP, ModalityExperts, Routing
from nnunet_diffext.networks.blocks.patches import PatchEmbedding, PatchExpanding, PatchMerging, to_channels, to_grid
from nnunet_diffext.networks.blocks.window import (
    SwinBlock,
    WindowAttention,
    assemble,
    cut,
    partition,
    window_for,
)

DIM, HEADS = 12, 3


def tokens(*grid: int, batch: int = 2, dim: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(batch, *grid, dim, generator=torch.Generator().manual_seed(seed))


def attention(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool, dim: int = DIM) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(dim, HEADS, grid=grid, window=window, shifted=shifted)
    for p in module.parameters():  # so that everything matters, the biases too
        nn.init.normal_(p, std=0.3)
    return module


def block(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool, dim: int = DIM) -> SwinBlock:
    module = SwinBlock(dim, HEADS, MLP(dim, 4 * dim), grid=grid, window=window, shifted=shifted)
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module.eval()


def copy_into(oracle: nn.Module, ours: SwinBlock, mlp: tuple[str, str]) -> None:
    """timm's and MONAI's blocks differ in the names of the MLP's layers."""
    names = {
        "norm1": ours.norm1, "norm2": ours.norm2, "attn.qkv": ours.attention.qkv, "attn.proj": ours.attention.out,
        mlp[0]: ours.ffn.into, mlp[1]: ours.ffn.out,
    }  # fmt: skip
    weights = {f"{name}.{key}": value for name, module in names.items() for key, value in module.state_dict().items()}
    weights["attn.relative_position_bias_table"] = ours.attention.bias
    missing = oracle.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("index" in k for k in missing.missing_keys)


# ------------------------------------------------------------------ size of the windows
@pytest.mark.parametrize(
    ("grid", "window", "expected"),
    [
        ((56, 28, 14, 7), 7, (7, 7, 7, 7)),  # Swin-UNet at 224 x 224
        ((64, 32, 16, 8), 7, (8, 8, 8, 8)),
        ((5, 1, 3), 7, (5, 1, 3)),
        ((20, 48, 10), 7, (5, 8, 5)),
        ((11, 13, 97), 7, (6, 7, 7)),  # 12 and 14 and 98 with padding
        ((6, 9, 11), 4, (3, 3, 4)),
    ],
)
def test_window_size(grid: tuple[int, ...], window: int, expected: tuple[int, ...]) -> None:
    assert window_for(grid, window) == expected


def test_windows_are_not_much_smaller_or_larger_than_asked_for() -> None:
    for g in range(1, 200):
        (size,) = window_for((g,), 7)
        assert size == g if g <= 7 else 4 <= size <= 8
        assert -g % size <= 3


@pytest.mark.parametrize(("grid", "window"), [((6, 8), (3, 4)), ((4, 6, 10), (2, 3, 5)), ((4, 6), (4, 6))])
def test_partition_round_trip(grid: tuple[int, ...], window: tuple[int, ...]) -> None:
    x = tokens(*grid)
    windows = partition(x, window)
    assert torch.equal(assemble(windows, window, grid), x)
    first = x[(slice(None), *(slice(w) for w in window))]
    assert torch.equal(windows[0], first.flatten(1, -2))


def test_few_masks_for_many_windows() -> None:
    windows = cut((32, 32, 32), (8, 8, 8), True)
    assert sum(len(numbers) for numbers in windows.groups.values()) == 64
    assert len(windows.groups) == 8, "the last window of an axis, or another one"
    assert windows.tables(torch.device("cpu"))[1].shape == (8, 512, 512)
    assert not cut((32, 32, 32), (8, 8, 8), False).groups


# ------------------------------------------------------------------ oracles
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((8, 12), (4, 4)), ((14, 14), (7, 7)), ((4, 8), (4, 4))])
def test_block_is_that_of_timm(grid: tuple[int, int], window: tuple[int, int], shifted: bool) -> None:
    """The last grid is a single window along one axis: no shift there."""
    ours, x = block(grid, window, shifted), tokens(*grid)
    shift = tuple(w // 2 if shifted else 0 for w in window)
    oracle = swin_transformer.SwinTransformerBlock(DIM, grid, HEADS, window_size=window, shift_size=shift).eval()
    copy_into(oracle, ours, ("mlp.fc1", "mlp.fc2"))
    torch.testing.assert_close(ours(x), oracle(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((4, 6, 8), (2, 3, 4)), ((3, 6, 8), (3, 3, 4))])
def test_block_is_that_of_monai(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> None:
    ours, x = block(grid, window, shifted), tokens(*grid)
    shift = tuple(w // 2 if shifted else 0 for w in window)
    oracle = swin_unetr.SwinTransformerBlock(DIM, HEADS, window, shift, qkv_bias=True).eval()
    copy_into(oracle, ours, ("mlp.linear1", "mlp.linear2"))
    size, applied = swin_unetr.get_window_size(grid, window, shift)
    mask = swin_unetr.compute_mask(grid, size, applied, x.device)
    torch.testing.assert_close(ours(x), oracle(x, mask), atol=1e-5, rtol=1e-5)


def test_stage_is_that_of_timm() -> None:
    """Merging, two blocks. timm orders the neighbours by columns."""
    grid, half = (16, 24), (8, 12)
    merge, blocks = PatchMerging(DIM, (2, 2)), [block(half, (4, 4), shifted, 2 * DIM) for shifted in (False, True)]
    nn.init.normal_(merge.norm.weight)
    stage = swin_transformer.SwinTransformerStage(
        DIM, 2 * DIM, grid, depth=2, downsample=True, num_heads=HEADS, window_size=(4, 4)
    ).eval()
    for ours, theirs in zip(blocks, stage.blocks, strict=True):
        copy_into(theirs, ours, ("mlp.fc1", "mlp.fc2"))
    with torch.no_grad():
        for name, here in (("norm", merge.norm), ("reduction", merge.reduce)):
            for key, value in here.state_dict().items():
                ordered = value.unflatten(-1, (2, 2, DIM)).transpose(-3, -2).flatten(-3)
                getattr(getattr(stage.downsample, name), key).copy_(ordered)
    x = tokens(*grid)
    torch.testing.assert_close(blocks[1](blocks[0](merge(x))), stage(x), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ padding and shifts
def dense(module: WindowAttention, x: Tensor, allowed: Tensor, offset: Tensor) -> Tensor:
    """Every token with every other, under a mask and a bias per pair ``(T, T)``."""
    flat = x.flatten(1, -2)
    q, k, v = module.qkv(flat).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = module.bias[offset].permute(2, 0, 1).masked_fill(~allowed, -torch.inf)
    mixed = scaled_dot_product_attention(q, k, v, attn_mask=scores)
    return module.out(mixed.transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((7, 10), (4, 4)), ((9, 4), (4, 3)), ((5, 3, 7), (3, 4, 3)), ((3, 5), (4, 6)), ((9,), (5,))]
)
def test_grids_that_windows_do_not_divide(grid: tuple[int, ...], window: tuple[int, ...], shifted: bool) -> None:
    """What the definition says, token by token: same window, both on one side of the border where the shift wraps."""
    module, x = attention(grid, window, shifted), tokens(*grid)
    places = torch.cartesian_prod(*(torch.arange(g) for g in grid)).view(-1, len(grid))
    size = torch.tensor(window)
    shift = torch.tensor([w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True)])
    # without wrapping: windows start at -size + shift, so that the first may be cut off
    number = (places - shift).div(size, rounding_mode="floor")
    allowed = (number[:, None] == number[None]).all(-1)
    offset = torch.zeros(len(places), len(places), dtype=torch.long)
    for axis, w in enumerate(window):
        distance = (places[:, None, axis] - places[None, :, axis] + w - 1).clamp(0, 2 * w - 2)  # far ones are masked
        offset = offset * (2 * w - 1) + distance
    torch.testing.assert_close(module(x), dense(module, x, allowed, offset), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_is_never_attended_to(shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands there changes nothing, and no gradient becomes NaN."""
    module, x = attention((7, 10), (4, 4), shifted), tokens(7, 10).requires_grad_()
    out = module(x)
    module_of = "nnunet_diffext.networks.blocks.window.pad"
    monkeypatch.setattr(module_of, lambda x, sides: nn.functional.pad(x, sides, value=50.0))
    assert torch.equal(module(x), out)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in (x, *module.parameters()))


def test_any_grid_and_no_tables_in_the_state_dict() -> None:
    planned, x = attention((8, 8), (4, 4), True), tokens(6, 9)
    other = attention((6, 9), (4, 4), True)
    assert set(planned.state_dict()) == {"bias", "qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    other.load_state_dict(planned.state_dict())
    assert torch.equal(planned(x), other(x))


def test_shifted_windows_see_across_the_borders_of_the_others() -> None:
    for shifted in (False, True):
        x = tokens(8, 8, batch=1).requires_grad_()
        attention((8, 8), (4, 4), shifted)(x)[0, 3, 3].sum().backward()
        seen = x.grad[0].abs().sum(-1) > 0
        rows = slice(2, 6) if shifted else slice(0, 4)
        assert seen[rows, rows].all() and seen.sum() == 16


@pytest.mark.parametrize("experts", [0, 3])
def test_no_block_begins_as_the_identity(experts: int) -> None:
    """With few channels as with many: a branch adds a tenth of what comes in, and attention tells tokens apart."""
    torch.manual_seed(0)
    for dim in (24, 384):
        ffn = ModalityExperts(dim, 4 * dim, experts) if experts else MLP(dim, 4 * dim)
        block = SwinBlock(dim, 2, ffn, grid=(6, 6), window=(3, 3))
        x = torch.randn(4, 6, 6, dim)
        assert ffn(x, Routing.free(4, max(experts, 1))).std() > 0.1
        q, k, _ = block.attention.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, -1)).unbind(-3)
        assert (q[0, :, 0] @ k[0, :, 0].T).std() / q.shape[-1] ** 0.5 > 0.4
        assert block.attention(x).std() > 0.1


def test_stochastic_depth() -> None:
    """In training, a branch is skipped for whole samples; those that pass are scaled up."""
    torch.manual_seed(0)
    module, x = block((4, 4), (4, 4), False), tokens(4, 4, batch=64)
    module.drop_path.drop_prob = 0.5
    z = x + module.attention(module.norm1(x))
    torch.testing.assert_close(module(x), z + module.ffn(module.norm2(z)))
    module.ffn = nn.Module()
    module.ffn.forward = lambda z, routing: torch.zeros_like(z)
    change = module.train()(x) - x
    skipped = change.flatten(1).abs().amax(1) == 0
    assert 16 < skipped.sum() < 48
    torch.testing.assert_close(change[~skipped], 2 * (z - x)[~skipped], atol=1e-5, rtol=1e-5)


def test_float32_inside_of_autocast() -> None:
    module, x = attention((6, 6), (3, 3), True), tokens(6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32 and torch.equal(out, module(x.float()))


# ------------------------------------------------------------------ patches
@pytest.mark.parametrize("stride", [(2, 2), (1, 2, 2), (2, 2, 2), (2, 1), (4, 4)])
def test_merging_and_expanding(stride: tuple[int, ...]) -> None:
    coarse = (3, 4, 2)[: len(stride)]
    x = tokens(*(c * s for c, s in zip(coarse, stride, strict=True)))
    assert torch.equal(to_grid(to_channels(x, stride), stride), x)
    merged = PatchMerging(DIM, stride)(x)
    assert merged.shape == (2, *coarse, 2 * DIM)
    assert PatchExpanding(2 * DIM, stride, DIM)(merged).shape == x.shape
    voxel = x.clone()
    voxel[(0,) * (len(stride) + 1)] += 1
    changed = (to_channels(voxel, stride) != to_channels(x, stride)).any(-1)
    assert changed.sum() == 1 and changed[(0,) * (len(stride) + 1)], "neighbours stay together"


def test_embedding_is_linear_per_patch() -> None:
    embed, image = PatchEmbedding(nn.Conv3d, 2, DIM, (1, 2, 2)), torch.randn(2, 2, 3, 4, 6)
    out = embed(image)
    assert out.shape == (2, 3, 2, 3, DIM)
    patch = image[:, :, 1, 2:4, 4:6].flatten(1)
    token = embed.norm(nn.functional.linear(patch, embed.project.weight.flatten(1), embed.project.bias))
    torch.testing.assert_close(out[:, 1, 1, 2], token)
    with pytest.raises(ValueError, match=r"\(3, 5, 6\) voxels cannot be cut into tokens of \(1, 2, 2\)"):
        embed(torch.randn(1, 2, 3, 5, 6))
