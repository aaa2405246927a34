"""Masked autoencoder of images, the first phase of M4oE: experts see but their own modality, and there is no gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.experts import MLP, ModalityExperts, Routing
from nnunet_diffext.networks.blocks.linear import STD, linear
from nnunet_diffext.networks.blocks.patches import PatchExpanding, grid_of, to_grid
from nnunet_diffext.networks.swin_unet import MLP_RATIO, SwinEncoder, SwinPlan


class ReconstructionOutput(NamedTuple):
    """What the loss needs: reconstruction and image ``(B, C, *patch)``; which voxels were hidden, bool
    ``(B, 1, *patch)``.
    """

    reconstruction: Tensor
    target: Tensor
    mask: Tensor


class M4oEAutoencoder(nn.Module):
    """Reconstructs images from a quarter of their patches (He et al. 2022; with windows: Dai et al. 2023).

    The encoder is that of :class:`~nnunet_diffext.networks.m4oe.M4oENet` with hard routing: every sample passes through
    the expert of its modality only, while attention is shared. Hidden voxels are set to 0 (the mean under
    z-scoring) before anything sees them, and their tokens replaced by a learnt one; there are no skip connections: what
    is hidden cannot reach the reconstruction.

    Args:
        architecture: what nnU-Net planned.
        patch_size: voxels.
        image_channels: C.
        experts: one per modality; 0: the encoder has plain MLPs.
        mask_ratio: share of the mask units that is hidden.
        mask_unit: embedded patches that are hidden together, for every axis; less where that is not a part of the grid.
        embed_stride, stages, embed_dim, depth, window, drop_path, stem: see :meth:`SwinPlan.of`; no stochastic depth
            by default.
    Raises:
        ValueError: nothing or everything would be hidden.
    """

    def __init__(
        self,
        architecture: Architecture,
        patch_size: Sequence[int],
        image_channels: int,
        experts: int,
        *,
        mask_ratio: float = 0.75,
        mask_unit: int = 4,
        embed_stride: int | None = None,
        stages: int = 4,
        embed_dim: int | None = None,
        depth: int = 2,
        window: int = 7,
        drop_path: float = 0.0,
        stem: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"A mask ratio of {mask_ratio} hides all or nothing; it must lie between 0 and 1.")
        self.experts, self.mask_ratio, self.mask_unit = max(experts, 1), mask_ratio, mask_unit
        plan = SwinPlan.of(
            architecture, patch_size, embed_stride=embed_stride, stages=stages, embed_dim=embed_dim, depth=depth,
            window=window, drop_path=drop_path, stem=stem,
        )  # fmt: skip
        self.stride = plan.embed_stride

        def plain(dim: int) -> nn.Module:
            return MLP(dim, MLP_RATIO * dim)

        def routed(dim: int) -> nn.Module:
            return ModalityExperts(dim, MLP_RATIO * dim, experts, gate="none")

        widths, levels = plan.widths, range(len(plan.strides))[::-1]
        self.encoder = SwinEncoder(plan, image_channels, routed if experts else plain)
        # as large as the tokens that it stands for, behind their layer norm
        self.mask_token = nn.Parameter(torch.randn(widths[0]))
        self.expanding = nn.ModuleList(PatchExpanding(widths[i + 1], plan.strides[i], widths[i]) for i in levels)
        self.levels = nn.ModuleList(plan.block(i, plain) for i in levels)
        self.norm = nn.LayerNorm(widths[0])
        self.to_voxels = linear(widths[0], math.prod(self.stride) * image_channels)
        nn.init.trunc_normal_(self.to_voxels.weight, std=STD)  # at first, the mean of the image

    def forward(self, image: Tensor, *, modality: Tensor | None = None) -> ReconstructionOutput:
        """Reconstruct images from patches that are drawn anew in every pass.

        Args:
            image: ``(B, C, *patch)``.
            modality: ``(B,)``, the expert of every sample.
        Raises:
            TypeError: ``modality`` is missing, as when a predictor asks for a segmentation.
            ValueError: tokens do not divide the image.
        """
        if modality is None:
            raise TypeError(
                "A masked autoencoder reconstructs images and cannot segment them. Train the method that builds on it, "
                "-tr M4oETrainer, and predict with that."
            )
        mask = self.draw_mask(len(image), grid_of(image, self.stride), image.device).unsqueeze(-1)
        hidden = self._of_voxels(mask)
        tokens, _ = self.encoder.embed(image.masked_fill(hidden, 0))
        tokens = torch.where(mask, self.mask_token.to(tokens.dtype), tokens)
        return ReconstructionOutput(self._reconstruct(tokens, modality), image, hidden)

    def features(self, image: Tensor, modality: Tensor) -> Tensor:
        """Deepest tokens of whole images, ``(B, C, *patch)`` -> ``(B, D, *grid)``; nothing is hidden."""
        routing = Routing.free(len(image), self.experts, modality)
        return self.encoder(self.encoder.embed(image)[0], routing)[-1].movedim(-1, 1)

    def draw_mask(self, batch: int, grid: Sequence[int], device: torch.device) -> Tensor:
        """Hidden tokens, bool ``(B, *grid)``: for every sample the same share of the mask units.

        Raises:
            ValueError: the grid is a single token.
        """
        unit = [max(1, min(self.mask_unit, g // 2)) for g in grid]
        size = [-(-g // u) for g, u in zip(grid, unit, strict=True)]
        total = math.prod(size)
        if total < 2:
            raise ValueError(f"A grid of {tuple(grid)} tokens cannot be hidden in part.")
        hidden = min(max(1, round(self.mask_ratio * total)), total - 1)
        mask = torch.rand(batch, total, device=device).argsort(1) < hidden
        mask = mask.view(batch, *size)
        for axis, (u, g) in enumerate(zip(unit, grid, strict=True), start=1):
            mask = mask.repeat_interleave(u, axis).narrow(axis, 0, g)
        return mask

    def _reconstruct(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """``(B, *grid, C)`` -> ``(B, C, *patch)``."""
        x = self.encoder(tokens, Routing.free(len(tokens), self.experts, modality))[-1]
        for expand, block in zip(self.expanding, self.levels, strict=True):
            x = block(expand(x))
        return to_grid(self.to_voxels(self.norm(x)), self.stride).movedim(-1, 1)

    def _of_voxels(self, mask: Tensor) -> Tensor:
        """``(B, *grid, 1)`` -> ``(B, 1, *patch)``."""
        return to_grid(mask.expand(*mask.shape[:-1], math.prod(self.stride)), self.stride).movedim(-1, 1)


def encoder_weights(pretrained_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of an :class:`M4oEAutoencoder`'s state dict, named as in ``M4oENet.encoder``.

    It has no gates: ``net.encoder.load_state_dict(weights, strict=False)`` leaves those as they are.
    """
    prefix = "encoder."
    return {k.removeprefix(prefix): v for k, v in pretrained_weights.items() if k.startswith(prefix)}


def spread_expert(weights: Mapping[str, Tensor], experts: int, noise: float = 0.01) -> dict[str, Tensor]:
    """Encoder weights with more experts: those that are there, then noisy copies of their mean.

    With a single modality, one trained MLP becomes all experts ("sparse upcycling", Komatsuzaki et al. 2023). Exact
    copies under equal gates would all get the same gradient and stay copies.

    Args:
        weights: of :func:`encoder_weights`.
        experts: how many there shall be.
        noise: standard deviation, relative to that of the tensor.
    """
    spread = dict(weights)
    for key, tensor in weights.items():
        if key.rpartition(".")[2] in ModalityExperts.stacked and len(tensor) < experts:
            copies = tensor.mean(0, keepdim=True).repeat(experts - len(tensor), *(1,) * (tensor.ndim - 1))
            copies += noise * tensor.std() * torch.randn_like(copies)
            spread[key] = torch.cat([tensor, copies])
    return spread
