"""How much of the labels survives the way through a latent space: the ceiling of every latent method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace


class ReconstructionDice:
    """Dice per foreground label of ``decode(encode(masks))``, pooled over patches.

    Args:
        codec: ``encode(onehot)`` and ``decode(latents)``.
        space: label space.
    """

    def __init__(self, codec: nn.Module, space: LabelSpace) -> None:
        self.codec, self.space = codec, space
        self.first = 0 if space.regions else 1
        self.counts = torch.zeros(2, space.num_heads - self.first, dtype=torch.float64)

    @torch.no_grad()
    def add(self, onehot: Tensor, valid: Tensor) -> None:
        """One batch: masks ``(B, K, *patch)``, annotated voxels ``(B, 1, *patch)``."""
        self.count(self.codec.decode(self.codec.encode(onehot)), onehot, valid)

    @torch.no_grad()
    def count(self, logits: Tensor, onehot: Tensor, valid: Tensor) -> None:
        """The same for masks that were reconstructed already, as logits ``(B, K, *patch)``."""
        hard = self.space.harden(self.space.probabilities(logits)) * valid
        axes = (0, *range(2, onehot.ndim))
        both, either = (hard * onehot).sum(axes), (hard + onehot * valid).sum(axes)
        self.counts += torch.stack([2 * both, either])[:, self.first :].double().cpu()

    def dice(self) -> list[float]:
        """One value per foreground label; NaN where no patch showed it."""
        shown = self.counts[1] > 0
        return torch.where(shown, self.counts[0] / self.counts[1].clamp_min(1), torch.nan).tolist()


def too_lossy(dice: Sequence[float], names: Sequence[str], least: float) -> Mapping[str, float]:
    """Labels whose reconstruction is worse than ``least``. Labels that were not seen are not judged."""
    return {name: d for name, d in zip(names, dice, strict=True) if d < least}


def label_share(latents: Tensor) -> float:
    """Variance between the samples of a batch, relative to all variance; 0 where latents do not depend on the label."""
    if len(latents) < 2:
        return float("nan")
    return float(latents.float().var(0, unbiased=False).mean() / latents.float().var(unbiased=False).clamp_min(1e-8))
