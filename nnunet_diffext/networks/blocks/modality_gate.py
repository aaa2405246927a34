"""Which modality an image has, told from the image alone: whose head answers if nobody says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from nnunet_diffext.diffusion.schedules import autocast_off
from nnunet_diffext.networks.blocks.experts import NEVER, log_softmax

WIDTHS = (16, 32, 64)
EPSILON = 1e-6
"""Added to variances: the gradient of a deviation of 0 is infinite."""


class ModalityGate(nn.Module):
    """``log P(m | x)``: convolutions without normalisation, which would hide intensities; mean, maximum and standard
    deviation over the voxels; a linear map for every modality, which starts at zero.

    It learns beside the network, not in it. Gates over experts can be made to tell the modality, too, but that can
    cost Dice, and frozen ones do not learn to tell another modality (benchmarks/RESULTS.md).

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        image_channels: C.
        modalities: M.
    """

    def __init__(self, conv_op: type[nn.Module], image_channels: int, modalities: int) -> None:
        super().__init__()
        sizes = zip((image_channels, *WIDTHS), WIDTHS, strict=False)
        self.convolutions = nn.ModuleList(conv_op(c, out, 3, stride=2, padding=1) for c, out in sizes)
        self.rows = nn.Linear(3 * WIDTHS[-1], modalities)
        nn.init.zeros_(self.rows.weight)
        nn.init.zeros_(self.rows.bias)

    def forward(self, image: Tensor, active: Tensor) -> Tensor:
        """``(B, M)``, float32; modalities that are not ``active``, bool ``(M,)``, have probability 0.

        Args:
            image: ``(B, C, *patch)`` of any size.
            active: modalities that may be told.
        """
        with autocast_off(image.device):
            x = image.float()
            for convolution in self.convolutions:
                x = leaky_relu(convolution(x), 0.01)
            x = x.flatten(2)
            deviation = (x.var(2, correction=0) + EPSILON).sqrt()
            seen = torch.cat([x.mean(2), x.amax(2), deviation], dim=1)
            # one product per modality: with one for all, their number decides how each is rounded
            rows = zip(self.rows.weight, self.rows.bias, active, strict=True)
            logits = [(seen @ weight + bias).masked_fill(~may, NEVER) for weight, bias, may in rows]
            return torch.stack(log_softmax(logits), dim=1)
