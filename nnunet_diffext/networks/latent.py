"""The way into the latent space and out of it: the finest stages of a planned U-Net, cut off at some stride."""

from __future__ import annotations

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from torch import Tensor, nn

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.attention import SelfAttention


class LatentEncoder(nn.Module):
    """Stages ``0 .. level`` of the planned encoder and a projection: ``(B, C, *patch)`` -> ``(B, channels, *latent)``.

    Args:
        architecture: what nnU-Net planned.
        input_channels: C.
        channels: of the latents; ``None``: no projection.
        level: the last stage.
        attentive: so many of the last stages end with self-attention.
    """

    def __init__(
        self, architecture: Architecture, input_channels: int, channels: int | None, level: int, attentive: int = 0
    ) -> None:
        super().__init__()
        net = architecture.build(input_channels, 2)
        self.stem = getattr(net.encoder, "stem", None) or nn.Identity()
        self.stages = nn.ModuleList(net.encoder.stages[: level + 1])
        self.attention = nn.ModuleDict(
            {
                str(i): SelfAttention(architecture.conv_op, architecture.features[i])
                for i in range(max(0, level + 1 - attentive), level + 1)
            }
        )
        width = architecture.features[level]
        self.to_latent = nn.Identity() if channels is None else architecture.conv_op(width, channels, 1)

    def features(self, x: Tensor) -> Tensor:
        """Of the last stage, before the projection."""
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.to_latent(self.features(x))


class LatentDecoder(nn.Module):
    """Latents ``(B, channels, *latent)`` -> logits ``(B, K, *patch)``, without skip connections: they see masks alone.

    Args:
        architecture: what nnU-Net planned, in the width that the decoder should have.
        channels: of the latents.
        num_classes: K.
        level: stage that the latents have the resolution of.
    """

    def __init__(self, architecture: Architecture, channels: int, num_classes: int, level: int) -> None:
        super().__init__()
        a, conv = architecture, architecture.conv_op
        transposed = get_matching_convtransp(conv)
        self.from_latent = a.convolutions(1, channels, a.features[level], level)
        self.upsampling, self.stages = nn.ModuleList(), nn.ModuleList()
        for finer in range(level - 1, -1, -1):
            stride = a.strides[finer + 1]
            self.upsampling.append(transposed(a.features[finer + 1], a.features[finer], stride, stride))
            self.stages.append(a.convolutions(1, a.features[finer], a.features[finer], finer))
        self.seg_layers = nn.ModuleList([conv(a.features[0], num_classes, 1)])

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = self.from_latent(latents)
        for up, stage in zip(self.upsampling, self.stages, strict=True):
            x = stage(up(x))
        return self.seg_layers[0](x)
