"""The two experts' backbones, both made of the stages that nnU-Net planned: a V-Net and a time-conditioned U-Net."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.time import FiLM, TimeEmbedding


class UNetOutput(NamedTuple):
    """Logits ``(B, K, *)`` and features, finest first: those of every level, down to the deepest encoder output, and
    the encoder's. ``coarse``: logits of further levels, next to the finest first; in training only.
    """

    logits: Tensor
    features: list[Tensor]
    encoder: list[Tensor]
    coarse: list[Tensor]


class UNetBackbone(nn.Module):
    """A planned U-Net that also returns its decoder features. Subclasses decide how one stage is applied.

    Args:
        architecture: what nnU-Net planned.
        input_channels: channels of the input.
        num_classes: K, output channels.
        deep_supervision: also heads at the levels that nnU-Net supervises: all of the decoder but the coarsest.
    """

    def __init__(
        self, architecture: Architecture, input_channels: int, num_classes: int, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        net = architecture.build(input_channels, num_classes)
        self.stem = getattr(net.encoder, "stem", None) or nn.Identity()
        self.encoder = nn.ModuleList(net.encoder.stages)
        self.upsampling = net.decoder.transpconvs
        self.decoder = net.decoder.stages
        # no head that is not used: DDP refuses parameters without gradient
        heads = list(net.decoder.seg_layers)[::-1]
        self.seg_layers = nn.ModuleList(heads[: max(1, len(heads) - 1)] if deep_supervision else heads[:1])

    def encoder_stage(self, level: int, x: Tensor, condition: Tensor | None) -> Tensor:
        """Apply encoder stage ``level`` (0 = finest)."""
        return self.encoder[level](x)

    def decoder_stage(self, index: int, x: Tensor, condition: Tensor | None) -> Tensor:
        """Apply decoder stage ``index`` (0 = coarsest)."""
        return self.decoder[index](x)

    def run(self, x: Tensor, condition: Tensor | None = None) -> UNetOutput:
        """``(B, C, *patch)`` -> logits and features."""
        x = self.stem(x)
        skips = []
        for level in range(len(self.encoder)):
            x = self.encoder_stage(level, x, condition)
            skips.append(x)
        features = [x]
        for index, up in enumerate(self.upsampling):
            x = self.decoder_stage(index, torch.cat([up(x), skips[-(index + 2)]], dim=1), condition)
            features.append(x)
        features = features[::-1]
        coarse = [head(f) for head, f in zip(self.seg_layers[1:], features[1:], strict=False)] if self.training else []
        return UNetOutput(self.seg_layers[0](x), features, skips, coarse)


class VNet(UNetBackbone):
    """V-Net (Milletari et al. 2016): strided and transposed convolutions, a residual in every stage.

    Residual stages of a ResEnc plan are V-Net stages already and are used as they are.
    """

    def encoder_stage(self, level: int, x: Tensor, condition: Tensor | None) -> Tensor:
        return _residual(self.encoder[level], x)

    def decoder_stage(self, index: int, x: Tensor, condition: Tensor | None) -> Tensor:
        return _residual(self.decoder[index], x)

    def forward(self, image: Tensor) -> UNetOutput:
        """``(B, C, *patch)`` -> logits and features."""
        return self.run(image)


class ConditionalUNet(UNetBackbone):
    """U-Net on image and noisy mask, which enter as channels, with every stage modulated by the timestep.

    Args:
        architecture: what nnU-Net planned.
        image_channels: channels of the image.
        mask_channels: channels of the noisy mask ``y_t``.
        num_classes: K, channels of the predicted clean mask (logits).
        time_channels: width of the time embedding.
        deep_supervision: see :class:`UNetBackbone`.
    """

    def __init__(
        self,
        architecture: Architecture,
        image_channels: int,
        mask_channels: int,
        num_classes: int,
        time_channels: int = 128,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(architecture, image_channels + mask_channels, num_classes, deep_supervision)
        features = architecture.features
        self.time_embedding = TimeEmbedding(time_channels)
        self.encoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features)
        self.decoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features[-2::-1])

    def encoder_stage(self, level: int, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.encoder_films[level](self.encoder[level](x), condition)

    def decoder_stage(self, index: int, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.decoder_films[index](self.decoder[index](x), condition)

    def forward(self, image: Tensor, noisy_mask: Tensor, t: Tensor) -> UNetOutput:
        """``image``: ``(B, C, *patch)``, ``noisy_mask``: ``(B, K, *patch)``, ``t``: ``(B,)`` -> logits and features."""
        return self.run(torch.cat([image, noisy_mask.to(image.dtype)], dim=1), self.time_embedding(t))


def _residual(stage: nn.Module, x: Tensor) -> Tensor:
    """V-Net's shortcut: the first convolution changes resolution and width, the others are a residual."""
    blocks = stage[-1] if isinstance(stage, nn.Sequential) else stage
    if not hasattr(blocks, "convs"):
        return stage(x)
    if isinstance(stage, nn.Sequential):
        for module in stage[:-1]:  # pooling, if planned
            x = module(x)
    x = blocks.convs[0](x)
    return x + blocks.convs[1:](x) if len(blocks.convs) > 1 else x
