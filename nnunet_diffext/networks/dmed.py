"""DMED-Seg's network: a diffusion expert, a convolutional expert and their fusion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunet_diffext.diffusion import LabelSpace, NoiseSchedule, seeded_noise
from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.fusion import DynamicFusion
from nnunet_diffext.networks.unet import ConditionalUNet, UNetOutput, VNet

EXPERTS = ("both", "de", "ce")
FUSIONS = ("transformer", "average")


class DMEDOutput(NamedTuple):
    """What the losses need. Logits are ``(B, K, *patch)``; absent parts are ``None``.

    ``weights``: expert weights ``(B, 2, *)`` (DE, CE) per scale, finest first. ``embeddings``: the two experts'
    projected deepest features ``(B, E, *)``. ``denoised``: logits of the diffusion pass on the labelled images.
    ``de_levels``, ``ce_levels``: the experts' logits ``(B, K, *level)`` for their own losses, finest first; with deep
    supervision more than one.
    """

    fused: Tensor
    de: Tensor | None
    ce: Tensor | None
    weights: list[Tensor]
    embeddings: tuple[Tensor, Tensor] | None
    denoised: Tensor | None
    de_levels: list[Tensor]
    ce_levels: list[Tensor]


class DMEDNet(nn.Module):
    """Diffusion expert (DE) + convolutional expert (CE) + Dynamic Fusion Module (DFM), section 3.

    The fused path always sees DE at ``t = T``, where ``y_T`` is pure noise: exactly what it sees at prediction, in one
    pass. A mask noised to a random ``t`` gives the label away for most ``t``; it only enters the separate diffusion
    pass.

    Args:
        architecture: what nnU-Net planned; both experts are built from it.
        image_channels: C.
        label_space: heads K, softmax or regions.
        experts: ``"both"``, or one of ``"de"``, ``"ce"`` alone (Table 2, first rows).
        fusion: ``"transformer"`` (DFM) or ``"average"`` of the two probability maps (Table 2, third row).
        fuse_predictions: see :class:`DynamicFusion`.
        coupled: the loss on the fused prediction reaches the experts. Otherwise it trains the fusion alone: members of
            an ensemble that learn from their joint output come to depend on each other (Jeffares et al. 2023).
        full_resolution_de: DE runs at full resolution; otherwise it starts at the resolution of the second stage.
        embedding_channels: width of the projections for the feature alignment (eq. 3); 0 builds none.
        schedule: noise schedule of DE.
        target_scale: b, clean masks are ``b * (2 y - 1)``; a small b keeps the mask unreadable for more t (Chen 2023).
        noise_seed: seed of the noise at prediction.
        deep_supervision: the experts have heads at coarser levels, in training.
    """

    def __init__(
        self,
        architecture: Architecture,
        image_channels: int,
        label_space: LabelSpace,
        *,
        experts: str = "both",
        fusion: str = "transformer",
        fuse_predictions: bool = True,
        coupled: bool = True,
        full_resolution_de: bool = True,
        embedding_channels: int = 128,
        schedule: str = "cosine",
        target_scale: float = 0.1,
        noise_seed: int = 0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        k = label_space.num_heads
        self.label_space = label_space
        self.target_scale = target_scale
        self.noise_seed = noise_seed
        self.coupled = coupled
        self.schedule = NoiseSchedule(schedule)
        self.mode = "trilinear" if architecture.conv_op is nn.Conv3d else "bilinear"
        self._noise: tuple[tuple, Tensor] | None = None  # of the last patch size: drawing it takes longer than a pass
        both = experts == "both"
        de_plan = architecture if full_resolution_de else architecture.coarser()
        deep = {"deep_supervision": deep_supervision}
        self.de = ConditionalUNet(de_plan, image_channels, k, k, **deep) if experts != "ce" else None
        self.ce = VNet(architecture, image_channels, k, **deep) if experts != "de" else None
        self.fusion = self.lift_de = self.project = None
        if both and fusion == "transformer":
            self.fusion = DynamicFusion(
                architecture.conv_op, architecture.features, k, fuse_predictions=fuse_predictions
            )
            if not full_resolution_de:
                self.lift_de = architecture.conv_op(architecture.features[1], architecture.features[0], 1)
        if both and embedding_channels:
            deepest = architecture.features[-1]
            self.project = nn.ModuleList(architecture.conv_op(deepest, embedding_channels, 1) for _ in range(2))

    def forward(
        self,
        image: Tensor,
        *,
        clean: Tensor | None = None,
        clean_image: Tensor | None = None,
        recycle: bool = False,
        leaky: Tensor | None = None,
    ) -> Tensor | DMEDOutput:
        """Logits in eval mode; in training mode everything the losses need.

        Args:
            image: ``(B, C, *patch)``.
            clean: one-hot masks ``(L, K, *patch)`` of ``clean_image`` ``(L, C, *patch)`` for the diffusion pass:
                x0-prediction at ``t ~ U{0..T-1}``); none, no pass.
            recycle: noise the experts' own prediction instead of ``clean`` in that pass.
            leaky: one-hot masks ``(B, K, *patch)`` noised into the fused path, a documented mistake kept as a control.
        """
        if not self.training:
            return self.segment(image, self.inference_noise(image)).fused
        t = None
        if leaky is not None and self.de is not None:
            t, y_t = self.noised(leaky)
        else:
            y_t = torch.randn(self._mask_shape(image), device=image.device)
        output = self.segment(image, y_t, t)
        if clean is None or self.de is None:
            return output
        if recycle:
            with torch.no_grad():
                start = self.de_pass(clean_image, torch.randn_like(clean, dtype=torch.float32))
                clean = self.label_space.probabilities(start.logits)
            torch.clear_autocast_cache()  # before PyTorch 2.10, casts made here would hide gradients later (#112583)
        t, y_t = self.noised(clean)
        return output._replace(denoised=self.de_pass(clean_image, y_t, t).logits)

    def segment(self, image: Tensor, noisy_mask: Tensor, t: Tensor | None = None) -> DMEDOutput:
        """Both experts and their fusion; ``noisy_mask`` ``(B, K, *patch)`` at ``t``, by default noise at ``t = T``."""
        de = self.de_pass(image, noisy_mask, t) if self.de is not None else None
        ce = self.ce(image) if self.ce is not None else None
        levels = [[] if out is None else [out.logits, *out.coarse] for out in (de, ce)]
        if de is None or ce is None:
            single = (de or ce).logits
            return DMEDOutput(single, de and de.logits, ce and ce.logits, [], None, None, *levels)
        weights: list[Tensor] = []
        if self.fusion is None:
            p = (self.label_space.probabilities(de.logits) + self.label_space.probabilities(ce.logits)) / 2
            fused = self.label_space.log_probabilities(p)
        else:
            fused, weights = self.fusion(*self.fusion_inputs(de, ce))
        embeddings = None
        if self.project is not None and self.training:
            embeddings = (self.project[0](de.features[-1]), self.project[1](ce.features[-1]))
        return DMEDOutput(fused, de.logits, ce.logits, weights, embeddings, None, *levels)

    def fusion_inputs(self, de: UNetOutput, ce: UNetOutput) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Arguments of :class:`DynamicFusion`: both experts' features at the same levels, and their logits."""
        if not self.coupled:
            de, ce = (UNetOutput(out.logits.detach(), [f.detach() for f in out.features], [], []) for out in (de, ce))
        features = de.features
        if self.lift_de is not None:
            finest = interpolate(features[0], size=de.logits.shape[2:], mode=self.mode)
            features = [self.lift_de(finest), *features]
        return features, ce.features, de.logits, ce.logits

    def de_pass(self, image: Tensor, noisy_mask: Tensor, t: Tensor | None = None) -> UNetOutput:
        """One pass of the diffusion expert: predicted clean mask (x0, as logits) at full resolution, and features."""
        if t is None:
            t = torch.full((len(image),), self.schedule.timesteps - 1, device=image.device)
        out = self.de(image, noisy_mask, t)
        size = image.shape[2:]
        if out.logits.shape[2:] == size:
            return out
        return out._replace(logits=interpolate(out.logits, size=size, mode=self.mode))

    def noised(self, onehot: Tensor) -> tuple[Tensor, Tensor]:
        """Random timesteps ``(B,)`` and ``y_t = sqrt(abar_t) b (2 y - 1) + sqrt(1 - abar_t) eps``, ``(B, K, *)``."""
        t = torch.randint(self.schedule.timesteps, (len(onehot),), device=onehot.device)
        clean = self.label_space.to_diffusion(onehot.float(), self.target_scale)
        return t, self.schedule.add_noise(clean, torch.randn_like(clean), t)

    def inference_noise(self, image: Tensor) -> Tensor:
        """The noise of every prediction: the same for each tile, mirrored with it in a mirrored pass."""
        shape = self._mask_shape(image)
        key = (*shape[1:], image.device)
        if self._noise is None or self._noise[0] != key:
            axes = tuple(range(2, image.ndim))
            drawn = seeded_noise((1, *shape[1:]), self.noise_seed, device=image.device, mirror_axes=axes)
            self._noise = (key, drawn)
        return self._noise[1].expand(shape)

    def _mask_shape(self, image: Tensor) -> tuple[int, ...]:
        return (len(image), self.label_space.num_heads, *image.shape[2:])
