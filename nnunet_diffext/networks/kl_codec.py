"""A pretrained image autoencoder as mask codec: classes become colours (2D, up to eight classes or three regions)."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace
from nnunet_diffext.networks.blocks.norm import LatentScale

MAX_CLASSES, MAX_REGIONS = 8, 3


class KLCodec(nn.Module):
    """Masks -> colours -> latents and back, around an autoencoder of RGB images in [-1, 1].

    Class k has the k-th corner of the RGB cube as its colour, so one image shows up to eight classes; a region has a
    colour channel of its own. Decoding gives ``-distance^2 / temperature`` to every corner as logits.

    Args:
        autoencoder: ``encode(x).latent_dist.mode()`` and ``decode(z).sample``, as diffusers' ``AutoencoderKL``.
        label_space: heads K.
        channels: of its latents.
        stride: pixels per latent.
        level: stage of nnU-Net's plan that has this stride.
        temperature: of the logits.
        image_range: values of nnU-Net's images that become -1 and 1.
    Raises:
        ValueError: more classes or regions than colours can tell apart.
    """

    corners: Tensor

    def __init__(
        self,
        autoencoder: nn.Module,
        label_space: LabelSpace,
        *,
        channels: int,
        stride: tuple[int, ...],
        level: int,
        temperature: float = 0.5,
        image_range: tuple[float, float] = (-3.0, 3.0),
    ) -> None:
        super().__init__()
        limit, what = (MAX_REGIONS, "regions") if label_space.regions else (MAX_CLASSES, "classes")
        if label_space.num_heads > limit:
            raise ValueError(
                f"Colours tell {limit} {what} apart, this dataset has {label_space.num_heads}. Leave the token 'kl8' "
                "out and train a MaskAutoencoderTrainer instead."
            )
        self.autoencoder, self.label_space = autoencoder, label_space
        self.channels, self.stride, self.level, self.temperature = channels, stride, level, temperature
        self.image_range = image_range
        self.scale = LatentScale(channels)
        corners = torch.tensor(list(product((-1.0, 1.0), repeat=3)))[: label_space.num_heads]
        self.register_buffer("corners", corners, persistent=False)

    def paint(self, onehot: Tensor) -> Tensor:
        """``(B, K, H, W)`` -> RGB ``(B, 3, H, W)``. Unused channels, and voxels without any class, are -1."""
        if self.label_space.regions:
            rgb = torch.full_like(onehot[:, :1], -1).repeat(1, 3, *(1,) * (onehot.ndim - 2))
            rgb[:, : onehot.shape[1]] = 2 * onehot - 1
            return rgb
        painted = torch.einsum("bkhw,kc->bchw", onehot.float(), self.corners.float())
        return painted - (1 - onehot.sum(1, keepdim=True))

    def read(self, rgb: Tensor) -> Tensor:
        """RGB ``(B, 3, H, W)`` -> logits ``(B, K, H, W)``, float32."""
        rgb = rgb.float()
        if self.label_space.regions:
            return 4 * rgb[:, : self.label_space.num_heads] / self.temperature
        distance = (rgb[:, None] - self.corners[None, :, :, None, None]).square().sum(2)
        return -distance / self.temperature

    def encode(self, onehot: Tensor) -> Tensor:
        """``(B, K, H, W)`` -> standardised latents ``(B, channels, H / f, W / f)``, float32."""
        return self.scale.standardise(self.raw_latents(onehot))

    def raw_latents(self, onehot: Tensor) -> Tensor:
        """Modes of the posterior, not standardised."""
        return self.autoencoder.encode(self.paint(onehot)).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Standardised latents -> logits ``(B, K, H, W)``."""
        return self.read(self.autoencoder.decode(self.scale.restore(latents)).sample)

    def image_encoder(self) -> RGBEncoder:
        """A trainable copy of the autoencoder's encoder (LEAF, E_theta)."""
        return RGBEncoder(self.autoencoder, self.image_range)


class RGBEncoder(nn.Module):
    """Images of nnU-Net to the latents of a pretrained autoencoder, trainable: ``(B, C, H, W)`` -> ``(B, k, h, w)``.

    One channel is shown as grey, two as the first and twice the second; of more than three it would see the first three
    only.

    Args:
        autoencoder: see :class:`KLCodec`.
        image_range: values that become black and white.
    """

    def __init__(self, autoencoder: nn.Module, image_range: tuple[float, float] = (-3.0, 3.0)) -> None:
        super().__init__()
        self.low, self.high = image_range
        self.encoder = deepcopy(autoencoder.encoder).requires_grad_(True)
        quant = getattr(autoencoder, "quant_conv", None)
        self.quant = nn.Identity() if quant is None else deepcopy(quant).requires_grad_(True)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        rgb = image[:, [min(i, image.shape[1] - 1) for i in range(3)]]
        scaled = 2 * (rgb - self.low) / (self.high - self.low) - 1
        moments = self.quant(self.encoder(scaled.clamp(-1, 1)))
        return moments.chunk(2, dim=1)[0]
