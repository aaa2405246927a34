"""The two halves of a cheap denoiser: what depends on the image alone, once; what depends on the noise, every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.time import FiLM, TimeEmbedding
from nnunet_diffext.networks.unet import UNetBackbone, UNetOutput


class ContextUNet(UNetBackbone):
    """U-Net on everything that is known before sampling starts: image and prior."""

    def forward(self, known: Tensor) -> UNetOutput:
        """``(B, C, *patch)`` -> logits ``(B, K, *patch)`` and the decoder's features of every level, finest first."""
        return self.run(known)


class StepUNet(UNetBackbone):
    """Light U-Net on the noisy state; the context is added to every encoder level, the timestep modulates every stage.

    Args:
        architecture: of this network.
        channels: of the noisy state and of the output, K.
        context_channels: of the context's features at every level, finest first.
        time_channels: width of the time embedding.
    """

    def __init__(
        self, architecture: Architecture, channels: int, context_channels: Sequence[int], time_channels: int = 64
    ) -> None:
        super().__init__(architecture, channels, channels)
        features = architecture.features
        self.time_embedding = TimeEmbedding(time_channels)
        self.encoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features)
        self.decoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features[-2::-1])
        self.guides = nn.ModuleList(
            architecture.conv_op(c, f, 1) for c, f in zip(context_channels, features, strict=True)
        )

    def guidance(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The context's features, projected to this network's width; the same for every step."""
        return [guide(f) for guide, f in zip(self.guides, features, strict=True)]

    def encoder_stage(self, level: int, x: Tensor, condition: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        embedding, guidance = condition
        return self.encoder_films[level](self.encoder[level](x) + guidance[level], embedding)

    def decoder_stage(self, index: int, x: Tensor, condition: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        return self.decoder_films[index](self.decoder[index](x), condition[0])

    def forward(self, noisy: Tensor, t: Tensor, guidance: Sequence[Tensor]) -> UNetOutput:
        """``noisy``: ``(B, K, *patch)``, ``t``: ``(B,)``, ``guidance``: see :meth:`guidance`."""
        return self.run(noisy, (self.time_embedding(t), guidance))


class SupervisionHeads(nn.Module):
    """Deep diffusion supervision (PGRD, eq. 6): logits at several levels.

    Around a prior, ``logits = exp(s) * prior's logits + correction``: a temperature for every voxel (Ding et al., ICCV
    2021) and a correction. Both start at zero, hence at the prior itself. Features behind instance norms could hardly
    express a factor on the prior's logits. Time enters through the step network's modulated features.

    Args:
        architecture: of the step network.
        context_channels: see :class:`StepUNet`.
        num_classes: K.
        levels: how many, from the finest on.
        around_prior: with the temperature.
    """

    def __init__(
        self,
        architecture: Architecture,
        context_channels: Sequence[int],
        num_classes: int,
        levels: int,
        around_prior: bool,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.seg_layers = nn.ModuleList(
            architecture.conv_op(f + c, num_classes + around_prior, 1)
            for f, c in list(zip(architecture.features, context_channels, strict=True))[:levels]
        )
        for layer in self.seg_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, step: Sequence[Tensor], context: Sequence[Tensor], prior: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Logits ``(B, K, *level)`` in float32, finest first, for as many levels as ``prior`` has (default: all).

        Args:
            step, context: features of every level, finest first.
            prior: the prior's logits ``(B, K, *level)``; ``None`` without one.
        """
        count = len(self.seg_layers) if prior is None else len(prior)
        out = [self.seg_layers[i](torch.cat([step[i], context[i]], dim=1)).float() for i in range(count)]
        if prior is None:
            return out
        k = self.num_classes
        return [p * o[:, k:].clamp(-3, 3).exp() + o[:, :k] for p, o in zip(prior, out, strict=True)]
