"""Phase 1 of M4oE: nothing hidden reaches the reconstruction, experts stay apart, weights fit phase 2 (METHODS 4.5)."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_swin import PLANS, images, make_autoencoder, make_net
from torch.nn.functional import avg_pool2d, interpolate

from nnunet_diffext.losses.diffusion import masked_error
from nnunet_diffext.networks.blocks.experts import ModalityExperts
from nnunet_diffext.networks.masked_autoencoder import encoder_weights, spread_expert

MODALITY = torch.tensor([0, 1, 0])


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("kind", PLANS)
def test_masked_voxels_never_reach_the_reconstruction(kind: str, stem: bool) -> None:
    """METHODS 4.5-5: their gradient is exactly zero, that of what is visible is not. Patches that are not square, and
    that windows do not divide, too.
    """
    net, image = make_autoencoder(kind, channels=2, stem=stem), images(kind, channels=2).requires_grad_()
    out = net(image, modality=MODALITY)
    assert out.reconstruction.shape == image.shape and out.target is image
    assert out.mask.shape == (3, 1, *image.shape[2:]) and out.mask.dtype == torch.bool
    out.reconstruction.square().sum().backward()
    gradient = image.grad.abs()
    assert (gradient * out.mask).max() == 0
    visible = gradient.sum(1, keepdim=True)[~out.mask]
    assert visible.min() > 0, "all of them matter"


def test_there_are_no_skip_connections() -> None:
    """All that the decoder gets is the deepest level."""
    net = make_autoencoder()
    net.encoder.norm.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    first, second = (net(images(seed=seed), modality=MODALITY).reconstruction for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("ratio", "kind", "share"), [(0.75, "2d-deep", 0.75), (0.5, "2d", 3 / 6), (0.01, "3d", 1 / 8), (0.9, "3d", 7 / 8)]
)
def test_share_of_the_mask_units(ratio: float, kind: str, share: float) -> None:
    """The same in every sample, but other ones, drawn anew from torch's generator."""
    net = make_autoencoder(kind, mask_ratio=ratio)
    image = images(kind, batch=8)
    grid = net.encoder.embed(image)[0].shape[1:-1]
    torch.manual_seed(3)
    mask = net.draw_mask(8, grid, image.device)
    assert mask.shape == (8, *grid)
    hidden = mask.flatten(1).float().mean(1)
    torch.testing.assert_close(hidden, torch.full((8,), share))
    assert len(mask.unique(dim=0)) > 1 and not torch.equal(mask, net.draw_mask(8, grid, image.device))
    torch.manual_seed(3)
    assert torch.equal(mask, net.draw_mask(8, grid, image.device))


def test_image_that_tokens_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"An image of \(15, 24\) voxels cannot be cut into tokens of \(2, 2\) voxels"):
        make_autoencoder()(torch.zeros(1, 1, 15, 24), modality=torch.zeros(1, dtype=torch.long))


def test_whole_units_are_hidden() -> None:
    """4 x 4 patches; smaller where the grid has not twice as many, and cut off where it has no multiple of them."""
    net = make_autoencoder()
    unit = net.draw_mask(2, (16, 16), torch.device("cpu")).float().unsqueeze(1)
    torch.testing.assert_close(interpolate(avg_pool2d(unit, 4), scale_factor=4), unit)
    for grid in ((10, 7), (3, 1), (2, 5, 9), (1, 2)):
        mask = net.draw_mask(4, grid, torch.device("cpu")).flatten(1)
        assert mask.any(1).all() and not mask.all(1).any()
    with pytest.raises(ValueError, match=r"\(1, 1\) tokens cannot be hidden in part"):
        net.draw_mask(2, (1, 1), torch.device("cpu"))
    for ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match="hides all or nothing"):
            make_autoencoder(mask_ratio=ratio)


def test_experts_are_isolated() -> None:
    """METHODS 4.5-3: a batch of CT leaves MR's experts alone, and trains all that is shared."""
    net = make_autoencoder()
    out = net(images(), modality=torch.zeros(3, dtype=torch.long))
    masked_error(out.reconstruction, out.target, out.mask).backward()
    for name, p in net.named_parameters():
        if name.startswith("encoder.") and ".ffn." in name:
            assert p.grad[0].abs().max() > 0 and p.grad[1].abs().max() == 0, name
        else:
            assert p.grad.abs().max() > 0, name


def test_loss_counts_hidden_voxels_only() -> None:
    net, image = make_autoencoder(channels=2), images(channels=2)
    out = net(image, modality=MODALITY)
    difference = (out.reconstruction - image).square().mean(1, keepdim=True)[out.mask]
    torch.testing.assert_close(masked_error(out.reconstruction, out.target, out.mask), difference.mean())


@pytest.mark.parametrize("stem", [True, False])
def test_it_learns_to_fill_in_what_is_hidden(stem: bool) -> None:
    """One image, seen many times: much better than its mean. Where a token lies only its neighbours can tell."""
    net = make_autoencoder(experts=1, embed_dim=16, window=8, depth=1, mask_ratio=0.5, stem=stem).train()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 24), indexing="ij")
    image = torch.sin(3 * x + 2 * y).expand(8, 1, -1, -1)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    errors = []
    for _ in range(240):
        out = net(image, modality=torch.zeros(8, dtype=torch.long))
        loss = masked_error(out.reconstruction, out.target, out.mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert sum(errors[-10:]) / 10 < 0.25 * image.var().item(), errors[::10]


# ------------------------------------------------------------------ to phase 2
@pytest.mark.parametrize("gate", ["token", "none"])
def test_weights_fit_the_segmentation_network(gate: str) -> None:
    """METHODS 4.5-4: every tensor of the encoder arrives, gates stay as they were, the decoder is not touched."""
    source, net = make_autoencoder(), make_net("2d", gate=gate)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = net.encoder.load_state_dict(encoder_weights(source.state_dict()), strict=False)
    assert result.unexpected_keys == []
    assert all(".ffn.gate." in key for key in result.missing_keys) and bool(result.missing_keys) == (gate == "token")
    trained = source.encoder.state_dict()
    for name, value in net.state_dict().items():
        inside = name.removeprefix("encoder.")
        loaded = name.startswith("encoder.") and inside in trained
        assert torch.equal(value, trained[inside] if loaded else before[name]), name
    assert sum(name.endswith("ffn.weight_in") for name in trained) == 4


def test_plain_encoder_fits_a_network_without_experts_there() -> None:
    source, net = make_autoencoder(experts=0), make_net("2d", where="decoder")
    net.encoder.load_state_dict(encoder_weights(source.state_dict()))
    assert not any(isinstance(module, ModalityExperts) for module in source.modules())


def test_one_expert_becomes_several() -> None:
    """Sparse upcycling: nearly the same function, but no two experts alike."""
    source = encoder_weights(make_autoencoder(experts=1).state_dict())
    torch.manual_seed(0)
    spread = spread_expert(source, 3, noise=0.01)
    net = make_net("2d", {"MR": (True, True)})
    assert net.experts == 3
    net.encoder.load_state_dict(spread, strict=False)
    key = "levels.0.0.ffn.weight_in"
    experts, one = spread[key], source[key][0]
    assert torch.equal(experts[0], one)
    for m in (1, 2):
        assert ((experts[m] - one).std() / one.std()).item() == pytest.approx(0.01, rel=0.2)
    assert not torch.equal(experts[1], experts[2])
    assert all(torch.equal(spread[name][:1], tensor[:1]) for name, tensor in source.items())
    two = spread_expert(encoder_weights(make_autoencoder().state_dict()), 3, noise=0.0)[key]
    torch.testing.assert_close(two[2], two[:2].mean(0))
    assert spread_expert(spread, 3)[key] is spread[key]


# ------------------------------------------------------------------ contracts
def test_it_refuses_to_segment() -> None:
    with pytest.raises(TypeError, match="cannot segment them. .* -tr M4oETrainer, and predict"):
        make_autoencoder().eval()(images())


def test_pickles_and_keeps_no_state() -> None:
    net = make_autoencoder()
    before = pickle.dumps(net)
    with torch.no_grad():
        net(images(), modality=MODALITY)
    assert pickle.dumps(net) == before


def test_finite_in_half_precision() -> None:
    net = make_autoencoder()
    with torch.autocast("cpu", torch.float16):
        out = net(100 * images(), modality=MODALITY)
        assert masked_error(out.reconstruction, out.target, out.mask).isfinite()
