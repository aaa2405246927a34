"""The gate that tells the modality: it learns from intensities and textures, and more modalities change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from nnunet_diffext.networks.blocks.modality_gate import ModalityGate

ALL = torch.ones(3, dtype=torch.bool)


def make(modalities: int = 3, channels: int = 1, conv_op: type[nn.Module] = nn.Conv2d) -> ModalityGate:
    torch.manual_seed(0)
    gate = ModalityGate(conv_op, channels, modalities)
    nn.init.normal_(gate.rows.weight)
    nn.init.normal_(gate.rows.bias)
    return gate


def scenes(modality: Tensor, seed: int) -> Tensor:
    """A bright disc on noise; the same, dark; the same, with stripes. Every image has zero mean and unit variance, as
    nnU-Net hands them over."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(20.0), indexing="ij")
    images = []
    for m in modality.tolist():
        cy, cx = (8 + 6 * torch.rand(2, generator=g)).tolist()
        disc = (((y - cy) ** 2 + (x - cx) ** 2) < 25).float()
        image = (1, -1, 1)[m] * disc + 0.2 * torch.randn(24, 20, generator=g) + (m == 2) * torch.sin(2 * y)
        images.append((image - image.mean()) / image.std())
    return torch.stack(images).unsqueeze(1)


def test_it_learns_what_modalities_look_like() -> None:
    """Unseen images, after as many small batches as an nnU-Net epoch has."""
    torch.manual_seed(0)
    gate = ModalityGate(nn.Conv2d, 1, 3)
    assert gate(scenes(torch.arange(3), 0), ALL).exp().unique().tolist() == pytest.approx([1 / 3])
    optimiser = torch.optim.AdamW(gate.parameters(), 2e-3)
    for step in range(250):
        modality = torch.randint(3, (2,), generator=torch.Generator().manual_seed(step))
        loss = nll_loss(gate(scenes(modality, step), ALL), modality)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    modality = torch.arange(60) % 3
    told = gate(scenes(modality, 1000), ALL)
    assert (told.argmax(1) == modality).float().mean() > 0.95
    assert nll_loss(told, modality) < 0.2


@pytest.mark.parametrize(
    ("conv_op", "shape"), [(nn.Conv2d, (7, 33)), (nn.Conv3d, (1, 9, 4)), (nn.Conv3d, (16, 20, 24)), (nn.Conv2d, (1, 1))]
)
def test_any_size_and_number_of_channels(conv_op: type[nn.Module], shape: tuple[int, ...]) -> None:
    told = make(3, 2, conv_op)(torch.randn(2, 2, *shape), ALL)
    assert told.shape == (2, 3) and told.dtype == torch.float32
    torch.testing.assert_close(told.exp().sum(1), torch.ones(2))


def test_inactive_modalities() -> None:
    """They are never told, and learn nothing; gradients stay finite."""
    gate, images = make(), scenes(torch.arange(3), 0)
    told = gate(images, torch.tensor([True, False, True]))
    assert told.exp()[:, 1].max() == 0
    torch.testing.assert_close(told[:, [0, 2]], gate(images, ALL)[:, [0, 2]].log_softmax(1))
    nll_loss(told, torch.tensor([0, 2, 0])).backward()
    assert gate.rows.weight.grad.isfinite().all() and gate.rows.weight.grad[1].abs().max() == 0


@torch.no_grad()
def test_one_more_that_is_not_active_changes_no_bit() -> None:
    gate, more, images = make(), make(4), scenes(torch.arange(3), 0)
    more.convolutions.load_state_dict(gate.convolutions.state_dict())
    more.rows.weight[:3], more.rows.bias[:3] = gate.rows.weight, gate.rows.bias
    assert torch.equal(more(images, torch.tensor([True, True, True, False]))[:, :3], gate(images, ALL))


@torch.no_grad()
def test_half_precision_changes_nothing() -> None:
    gate, images = make(), scenes(torch.arange(3), 0)
    with torch.autocast("cpu", torch.bfloat16):
        told = gate(images, ALL)
    assert torch.equal(told, gate(images, ALL))
