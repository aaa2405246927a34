"""Codecs, latent networks, and the pretrained models they may build on, of a few kilobytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import KINDS, Kind, make_architecture, make_batch, make_trainer
from tiny_prior import finish
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule
from nnunet_diffext.diffusion.parameterization import PredictionKind, target
from nnunet_diffext.networks.leaf import LEAFNet
from nnunet_diffext.networks.mask_autoencoder import MaskAutoencoder
from nnunet_diffext.networks.textdiffseg import LabelCodec, TextDiffSegNet
from nnunet_diffext.networks.unet import UNetOutput

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))

FLAT = Kind((16, 24), ((1, 1), (2, 2), (2, 2)), features=(4, 8, 8))
SMALL = Kind((6, 16, 12), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), features=(4, 8, 8))
TEXT = (2, 3, 8)
"""Prompts, tokens, width of a token."""


def patch_of(kind: str | Kind) -> tuple[int, ...]:
    return (KINDS[kind] if isinstance(kind, str) else kind).patch


def image_of(kind: str | Kind = FLAT, batch: int = 2, channels: int = 1, seed: int = 1) -> Tensor:
    """Unrelated to any mask."""
    return torch.randn(batch, channels, *patch_of(kind), generator=torch.Generator().manual_seed(seed))


def onehot_of(kind: str | Kind = FLAT, batch: int = 2, heads: int = 2, seed: int = 2) -> Tensor:
    """Random labels, one-hot."""
    labels = image_of(kind, batch, heads, seed).argmax(1)
    return nn.functional.one_hot(labels, heads).movedim(-1, 1).float().contiguous()


def noise_of(net: nn.Module, image: Tensor, seed: int = 3) -> Tensor:
    """Of the patch, as ``sample`` takes it."""
    shape = (len(image), net.noise_channels, *image.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_codec(kind: str | Kind = FLAT, heads: int = 2, regions: bool = False, **options: Any) -> MaskAutoencoder:
    """A seeded autoencoder, untrained, whose latents' statistics are known."""
    torch.manual_seed(0)
    codec = MaskAutoencoder(make_architecture(kind), LabelSpace(heads, regions), **options)
    with torch.no_grad():
        codec.train()(onehot_of(kind, heads=heads).bool())
    return codec.eval()


def make_leaf(
    plan: str | Kind = FLAT,
    *,
    heads: int = 2,
    channels: int = 1,
    regions: bool = False,
    stride: int = 8,
    **options: Any,
) -> LEAFNet:
    """A seeded network around :func:`make_codec`."""
    codec = make_codec(plan, heads, regions, stride=stride)
    return LEAFNet(codec, make_architecture(plan), channels, LabelSpace(heads, regions), **options)


def make_text(
    plan: str | Kind = FLAT,
    *,
    heads: int = 2,
    channels: int = 1,
    regions: bool = False,
    frozen: bool = False,
    simple_labels: bool = False,
    **options: Any,
) -> TextDiffSegNet:
    """A seeded network with random tokens; ``frozen``: on :func:`make_codec`."""
    space, architecture = LabelSpace(heads, regions), make_architecture(plan)
    torch.manual_seed(0)
    codec = make_codec(plan, heads, regions) if frozen else LabelCodec(architecture, space, simple=simple_labels)
    net = TextDiffSegNet(codec, frozen, architecture, channels, space, TEXT, **options)
    net.tokens.normal_(generator=torch.Generator().manual_seed(4))
    return net


class Oracle(nn.Module):
    """In place of a U-Net: what a perfect network of this kind would predict of ``z0``, at whichever ``t``."""

    def __init__(self, kind: PredictionKind, schedule: NoiseSchedule, z0: Tensor) -> None:
        super().__init__()
        self.kind, self.schedule, self.z0 = kind, schedule, z0
        self.timesteps: list[list[int]] = []

    def forward(self, known: Tensor, z_t: Tensor, t: Tensor) -> UNetOutput:
        self.timesteps.append(t.tolist())
        alpha, sigma = self.schedule.marginal(t, z_t.ndim)
        noise = (z_t - alpha * self.z0) / sigma
        features = [torch.zeros(len(z_t), 1, *z_t.shape[2:])] * 2
        return UNetOutput(target(self.kind, self.z0, noise, t, self.schedule), features, features, [])


def save_codec(tokens: str = "", kind: str | Kind = FLAT, **options: Any) -> Path:
    """Model folder of an untrained autoencoder whose latents' statistics are known; found by name without tokens."""
    trainer = make_trainer(tokens, kind, base="MaskAutoencoderTrainer", **options)
    trainer.initialize()
    heads = trainer.label_space.num_heads
    with torch.no_grad():
        trainer.network.train()(onehot_of(kind, heads=heads).bool())
    return finish(trainer)


def leaf(tokens: str, kind: str | Kind = FLAT, *, codec: bool = True, **options: Any) -> Any:
    """LEAF's trainer in training mode, on :func:`save_codec` if ``codec``."""
    if codec:
        save_codec(kind=kind, **options)
    trainer = make_trainer(tokens, kind, base="LEAFTrainer", **options)
    trainer.initialize()
    trainer.network.train()
    return trainer


def batch_of(trainer: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random images and labels of a trainer's dataset."""
    return make_batch(trainer, unlabeled=False, seed=seed)


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Names of the parameters that have other values now."""
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def offline(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No hub, no cache, no variable that names a model."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "empty_cache"))
    for name in ("teacher", "codec", "text_encoder"):
        patch.delenv(f"nnUNet_diffext_{name}", raising=False)


def use_teacher(patch: pytest.MonkeyPatch, folder: Path) -> nn.Module:
    """A tiny vision transformer in timm's folder layout becomes the teacher."""
    from tiny_models import make_vit, save_vit_folder

    vit = make_vit()
    patch.setenv("nnUNet_diffext_teacher", str(save_vit_folder(folder, vit.state_dict())))
    return vit


def use_bert(patch: pytest.MonkeyPatch, folder: Path) -> nn.Module:
    """A tiny BERT becomes the text encoder."""
    from tiny_models import save_bert

    patch.setenv("nnUNet_diffext_text_encoder", str(folder))
    return save_bert(folder)


def use_autoencoder(patch: pytest.MonkeyPatch, folder: Path) -> nn.Module:
    """A tiny KL autoencoder of stride 2 becomes the pretrained codec."""
    from tiny_models import make_autoencoder

    model = make_autoencoder()
    model.save_pretrained(folder)
    patch.setenv("nnUNet_diffext_codec", str(folder))
    return model
