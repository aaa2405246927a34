"""The two halves of a cheap denoiser: what depends on the image alone, once; what depends on the noise, every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.blocks.patches import to_channels, to_grid
from nnunet_diffext.networks.blocks.time import FiLM, TimeEmbedding
from nnunet_diffext.networks.unet import UNetBackbone, UNetOutput


class BlockUNet(UNetBackbone):
    """A planned U-Net whose stages start at the second one, where blocks of voxels are channels ("simple diffusion",
    Hoogeboom et al. 2023).

    What a voxel's own values say does not fit through there and goes around it.

    Args:
        architecture: of this network, with the finest stage, whose width the layers at full resolution have.
        channels: of the input.
        classes: K, of the output.
        kernel: of the layers at full resolution, an odd size for every axis.
        bias: of the same layers; a norm behind them would remove it.
    """

    def __init__(
        self, architecture: Architecture, channels: int, classes: int, kernel: Sequence[int], bias: bool = True
    ) -> None:
        level = min(1, len(architecture.features) - 2)  # of two stages, none can be left out
        finest, block = architecture.features[0], architecture.stride_of(level)
        voxels = math.prod(block)
        super().__init__(architecture.below(level), finest * voxels, finest * voxels)
        self.block, self.level, conv = block, level, architecture.conv_op
        around = tuple(k // 2 for k in kernel)
        self.fine_in = conv(channels, finest, kernel, padding=around, bias=bias)
        self.fine_skip = conv(finest, finest, kernel, padding=around, bias=bias)
        self.head = conv(finest, classes, 1)

    def through_blocks(self, fine: Tensor, condition: object = None) -> tuple[Tensor, UNetOutput]:
        """``(B, finest, *patch)`` through the U-Net and back to voxels, and all that it returned."""
        out = self.run(to_channels(fine.movedim(1, -1), self.block).movedim(-1, 1), condition)
        return to_grid(out.logits.movedim(1, -1), self.block).movedim(-1, 1), out

    def output(self, fine: Tensor, out: UNetOutput) -> UNetOutput:
        """Logits and features, finest first, with those of the voxels instead of the blocks."""
        return UNetOutput(self.head(fine), [fine, *out.features[1 - self.level :]], out.encoder, [])


class ContextUNet(BlockUNet):
    """U-Net on everything that is known before sampling starts: image and prior, whose contours are fine already."""

    def __init__(self, architecture: Architecture, channels: int, classes: int) -> None:
        super().__init__(architecture, channels, classes, architecture.kernels[0], bias=False)
        self.fine_norms = nn.ModuleList(architecture.norm(architecture.features[0]) for _ in range(2))

    def forward(self, known: Tensor) -> UNetOutput:
        """``(B, C, *patch)`` -> logits ``(B, K, *patch)`` and the decoder's features of every level, finest first."""
        own = leaky_relu(self.fine_norms[0](self.fine_in(known)), 0.01)
        together, out = self.through_blocks(own)
        return self.output(leaky_relu(self.fine_norms[1](self.fine_skip(own + together)), 0.01), out)


class StepUNet(BlockUNet):
    """Light U-Net on the noisy state, run at every step; guided by the context's features and the timestep.

    The noise enters multiplied with the context's finest features: the best evidence for an object of known place and
    unknown presence is the sum of the noisy state over its voxels, a product that convolutions and sums of features
    hardly learn.

    Args:
        architecture: see :class:`BlockUNet`.
        channels: of the noisy state and of the output, K.
        context_channels: of the context's features at every level, finest first.
        time_channels: width of the time embedding.
    """

    def __init__(
        self, architecture: Architecture, channels: int, context_channels: Sequence[int], time_channels: int = 64
    ) -> None:
        super().__init__(architecture, channels, channels, (1,) * architecture.dim)
        finest, features = architecture.features[0], architecture.features[self.level :]
        self.time_embedding = TimeEmbedding(time_channels)
        self.encoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features)
        self.decoder_films = nn.ModuleList(FiLM(time_channels, c) for c in features[-2::-1])
        self.fine_films = nn.ModuleList(FiLM(time_channels, finest) for _ in range(2))
        conv, coarse = architecture.conv_op, context_channels[self.level :]
        self.guides = nn.ModuleList(conv(c, f, 1) for c, f in zip(coarse, features, strict=True))
        self.fine_guide = conv(context_channels[0], finest, 1)

    def guidance(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The context's features, projected to this network's width; the same for every step."""
        coarse = [guide(f) for guide, f in zip(self.guides, features[self.level :], strict=True)]
        return [self.fine_guide(features[0]), *coarse]

    def encoder_stage(self, level: int, x: Tensor, condition: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        embedding, guidance = condition
        return self.encoder_films[level](self.encoder[level](x) + guidance[level], embedding)

    def decoder_stage(self, index: int, x: Tensor, condition: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        return self.decoder_films[index](self.decoder[index](x), condition[0])

    def forward(self, noisy: Tensor, t: Tensor, guidance: Sequence[Tensor]) -> UNetOutput:
        """``noisy``: ``(B, K, *patch)``, ``t``: ``(B,)``, ``guidance``: see :meth:`guidance`."""
        embedding = self.time_embedding(t)
        place, *coarse = guidance
        own = self.fine_in(noisy)
        together, out = self.through_blocks(own * place, (embedding, coarse))
        alone = self.fine_films[0](own + place, embedding)
        return self.output(self.fine_films[1](together + self.fine_skip(alone), embedding), out)


class SupervisionHeads(nn.Module):
    """Deep diffusion supervision (PGRD, eq. 6): logits at several levels.

    A head has a hidden layer, modulated by the timestep: how far to trust the prior depends on how much of the noise
    is left. Around a prior, ``logits = exp(s) * prior's logits + correction``: a temperature for every voxel (Ding et
    al., ICCV 2021) and a correction. Both start at zero, hence at the prior itself. Features behind instance norms
    could hardly express a factor on the prior's logits.

    Args:
        architecture: of the step network.
        context_channels: see :class:`StepUNet`.
        num_classes: K.
        levels: how many, from the finest on.
        around_prior: with the temperature.
        time_channels: width of the time embedding.
    """

    def __init__(
        self,
        architecture: Architecture,
        context_channels: Sequence[int],
        num_classes: int,
        levels: int,
        around_prior: bool,
        time_channels: int = 64,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        conv = architecture.conv_op
        widths = [f + c for f, c in zip(architecture.features, context_channels, strict=True)][:levels]
        self.time_embedding = TimeEmbedding(time_channels)
        self.hidden = nn.ModuleList(conv(width, width, 1) for width in widths)
        self.films = nn.ModuleList(FiLM(time_channels, width) for width in widths)
        self.seg_layers = nn.ModuleList(conv(width, num_classes + around_prior, 1) for width in widths)
        for layer in self.seg_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, step: Sequence[Tensor], context: Sequence[Tensor], t: Tensor, prior: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Logits ``(B, K, *level)`` in float32, finest first, for as many levels as ``prior`` has (default: all).

        Args:
            step, context: features of every level, finest first.
            t: ``(B,)``.
            prior: the prior's logits ``(B, K, *level)``; ``None`` without one.
        """
        count = len(self.seg_layers) if prior is None else len(prior)
        embedding = self.time_embedding(t)
        out = []
        for level in range(count):
            hidden = self.hidden[level](torch.cat([step[level], context[level]], dim=1))
            out.append(self.seg_layers[level](self.films[level](hidden, embedding)).float())
        if prior is None:
            return out
        k = self.num_classes
        return [p * o[:, k:].clamp(-3, 3).exp() + o[:, :k] for p, o in zip(prior, out, strict=True)]
