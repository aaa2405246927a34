"""A masked autoencoder of the same images as LEAF's teacher, where no pretrained vision transformer is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunet_diffext.networks.masked_autoencoder import M4oEAutoencoder


class SwinTeacher(nn.Module):
    """The frozen encoder of a masked autoencoder, whose deepest tokens LEAF's features imitate (eq. 5).

    It sees the patch as the student does, in 2D or 3D. Every channel of its tokens is standardised over the places of a
    sample (iREPA, arXiv 2512.10794): what all places share would make every cosine large, and teaches nothing.

    Args:
        autoencoder: trained.
        modality: index of the modality of a case, which chooses the experts.
    Attributes:
        channels: D, width of a token.
    """

    def __init__(self, autoencoder: M4oEAutoencoder, modality: Callable[[str], int]) -> None:
        super().__init__()
        self.autoencoder, self.modality = autoencoder, modality
        self.channels: int = autoencoder.encoder.norm.normalized_shape[0]
        self.float().requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> SwinTeacher:
        """Stay in eval mode, whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """Standardised tokens.

        Args:
            image: ``(B, C, *patch)``, normalised by nnU-Net.
            keys: cases of the samples; without, they are of the first modality.
        Returns:
            float32 ``(B, D, *grid)``.
        """
        indices = [0] * len(image) if keys is None else [self.modality(key) for key in keys]
        with torch.autocast(image.device.type, enabled=False):
            tokens = self.autoencoder.features(image.float(), torch.tensor(indices, device=image.device))
        places = tuple(range(2, tokens.ndim))
        deviation = tokens.std(places, correction=0, keepdim=True)
        return (tokens - tokens.mean(places, keepdim=True)) / (deviation + 1e-6)

    def pair(
        self, image: Tensor, features: Tensor, slices: int, keys: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features and tokens of the same places, both as maps of two dimensions.

        Args:
            image: ``(B, C, *patch)``.
            features: ``(B, F, *grid)`` of the student; tokens are interpolated to their grid.
            slices: not used, all axial slices of the grid are seen at once.
            keys: cases of the samples.
        Returns:
            ``(N, F, h, w)`` and ``(N, D, h, w)``; in 3D, N counts the axial slices of all samples.
        """
        linear = "bilinear" if features.ndim == 4 else "trilinear"
        tokens = interpolate(self(image, keys), features.shape[2:], mode=linear, align_corners=False)
        if features.ndim == 4:
            return features, tokens
        return features.transpose(1, 2).flatten(0, 1), tokens.transpose(1, 2).flatten(0, 1)
