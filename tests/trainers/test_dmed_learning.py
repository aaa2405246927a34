"""Small trainings: the default learns from the image, and cannot learn from the label; the leaky control can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Kind, dice, ready_trainer
from torch import Tensor

SQUARE = Kind((24, 24), ((1, 1), (2, 2)), features=(8, 16))


def discs(count: int, generator: torch.Generator) -> Tensor:
    """``(count, 1, 24, 24)`` masks of a disc each, anywhere, with about a tenth of the voxels."""
    axis = torch.arange(24.0)
    centre = 23 * torch.rand(count, 2, 1, 1, generator=generator)
    radius = 3 + 3 * torch.rand(count, 1, 1, generator=generator)
    inside = (axis[:, None] - centre[:, 0]) ** 2 + (axis[None] - centre[:, 1]) ** 2 < radius**2
    return inside[:, None]


def leak(tokens: str, steps: int) -> dict[str, float]:
    """Train on images of noise with unrelated labels; what the train-mode outputs know about new labels."""
    generator = torch.Generator().manual_seed(1)
    trainer = ready_trainer(tokens, SQUARE)
    for _ in range(steps):
        images = torch.randn(4, 1, 24, 24, generator=generator)
        trainer.train_step({"data": images, "target": discs(4, generator).short()})
    masks, images = discs(64, generator), torch.randn(64, 1, 24, 24, generator=generator)
    passes: list[tuple[Any, Any]] = []
    trainer.network.register_forward_hook(lambda _, __, kwargs, out: passes.append((kwargs, out)), with_kwargs=True)
    torch.manual_seed(0)
    with torch.no_grad():
        trainer.compute_losses({"data": images, "target": masks.short()})  # whatever the trainer shows its network
    ((kwargs, out),) = passes
    p = out.fused.softmax(1)[:, 1:]
    return {
        "dice": dice(p > 0.5, masks),
        "contrast": float(p[masks].mean() - p[~masks].mean()),
        "dice_of_diffusion_pass": dice(out.denoised.argmax(1, keepdim=True) == 1, kwargs["clean"][:, 1:] == 1),
        "chance": float(2 * masks.float().mean() / (1 + masks.float().mean())),  # everything foreground
    }


def test_label_leak_probe() -> None:
    """METHODS 2.5-1. Same noise level (b = 1), data and length; the only difference is what the fused path is shown."""
    default = leak("bscale1_diffusion4_momentum0p9", 60)
    assert default["chance"] < 0.25
    assert default["dice"] < 0.3
    assert abs(default["contrast"]) < 0.1
    # the diffusion expert did learn to read the label from y_t, in its own pass, where nothing is fused
    assert default["dice_of_diffusion_pass"] > 0.6

    control = leak("leaky_bscale1_diffusion4_momentum0p9", 60)
    assert control["dice"] > 0.6
    assert control["contrast"] > 0.4


def volumes(patch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two noisy balls: images ``(2, 1, *patch)`` and masks. No voxel's own value tells its class."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.arange(float(s)) for s in patch], indexing="ij")
    masks = []
    for _ in range(2):
        centre = [s * (0.35 + 0.3 * torch.rand((), generator=generator)) for s in patch]
        masks.append(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < (0.35 * min(patch)) ** 2)
    mask = torch.stack(masks)[:, None]
    return 1.5 * mask + 0.7 * torch.randn(mask.shape, generator=generator), mask


def overfitted(tokens: str, kind: str) -> tuple[Any, Tensor, Tensor]:
    """A trainer after 60 steps on the two volumes, its network in eval mode."""
    trainer = ready_trainer(tokens, kind)
    image, mask = volumes(tuple(trainer.configuration_manager.patch_size))
    assert dice(image > 0.75, mask) < 0.9, "a threshold would do: the test shows nothing"
    for _ in range(60):
        trainer.train_step({"data": image, "target": mask.short()})
    trainer.network.eval()
    return trainer, image, mask


@pytest.mark.parametrize("tokens", ["momentum0p9", "momentum0p9_halfDE"])
def test_overfits_two_volumes_from_pure_noise(tokens: str) -> None:
    """Dice after training, as nnU-Net's predictor sees it: one eval pass, no label anywhere near."""
    trainer, image, mask = overfitted(tokens, "3d-aniso")
    with torch.no_grad():
        assert dice(trainer.network(image).argmax(1, keepdim=True) == 1, mask) > 0.95


def test_overfits_two_images_and_hardly_depends_on_the_noise() -> None:
    """One step at t = T gives the posterior mean (METHODS 1.3), so other noise fields give nearly the same map."""
    trainer, image, mask = overfitted("", "2d")
    with torch.no_grad():
        fields = [torch.randn(2, 2, 16, 24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        maps = [trainer.network.segment(image, noise).fused.softmax(1)[:, 1:] for noise in fields]
        maps.append(trainer.network(image).softmax(1)[:, 1:])
    assert all(dice(p > 0.5, mask) > 0.95 for p in maps)
    assert all((p - maps[-1]).abs().mean() < 0.02 for p in maps)
