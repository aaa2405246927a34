"""The one codec between nnU-Net's training targets and diffusion variables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: log(_FLOOR) = -16.1: finite after nnU-Net's half-precision, Gaussian-weighted sum of logits (factor 10).
_FLOOR = 1e-7


@dataclass(frozen=True)
class LabelSpace:
    """Label layout of one dataset.

    | heads   | target `(B, C, *)`                              | channels      |
    |---------|-------------------------------------------------|---------------|
    | softmax | integer labels 0 .. K-1 (any dtype)             | C = 1         |
    | regions | one 0/1 mask per region, overlaps allowed       | C = K         |
    | regions | ... then the mask of ignored voxels, if there is an ignore label | C = K + 1 |

    Args:
        num_heads: K, nnU-Net's `label_manager.num_segmentation_heads`.
        regions: sigmoid heads instead of one softmax (`label_manager.has_regions`).
        ignore_label: value of voxels without annotation (`label_manager.ignore_label`), or None.
    Raises:
        ValueError: fewer heads than the layout needs, or an ignore label that is also a class.
    """

    num_heads: int
    regions: bool = False
    ignore_label: int | None = None

    def __post_init__(self) -> None:
        least = 1 if self.regions else 2
        if self.num_heads < least:
            layout = "region" if self.regions else "softmax"
            raise ValueError(f"{layout} labels need num_heads >= {least}, got {self.num_heads}")
        if not self.regions and self.ignore_label is not None and 0 <= self.ignore_label < self.num_heads:
            raise ValueError(
                f"ignore_label={self.ignore_label} is one of the classes 0 .. {self.num_heads - 1}; "
                "nnU-Net requires it to be the highest label"
            )

    @property
    def target_channels(self) -> int:
        """Channels of an nnU-Net target."""
        return self.num_heads + (self.ignore_label is not None) if self.regions else 1

    def encode(self, target: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
        """Target to one channel per head.

        Args:
            target: `(B, C, *)`, see the class.
            check: also look for labels that the dataset does not have. Reads the values, hence waits for the GPU.
        Returns:
            one-hot (regions: multi-hot), float32 `(B, K, *)`, all zero where invalid; validity, bool `(B, 1, *)`,
            False where ignored.
        Raises:
            ValueError: wrong number of channels; with `check`, values that are not allowed.
        """
        if target.ndim < 3 or target.shape[1] != self.target_channels:
            raise ValueError(
                f"expected a target (B, {self.target_channels}, *spatial) for {self}, got {tuple(target.shape)}"
            )
        if check:
            self._check_values(target)
        if self.regions:
            valid = torch.ones_like(target[:, :1], dtype=torch.bool)
            if self.ignore_label is not None:
                valid = target[:, -1:] < 0.5
            return target[:, : self.num_heads].float() * valid, valid
        classes = torch.arange(self.num_heads, device=target.device).view(1, -1, *(1,) * (target.ndim - 2))
        # The ignore label equals no class: its voxels come out all zero by themselves.
        valid = torch.ones_like(target, dtype=torch.bool) if self.ignore_label is None else target != self.ignore_label
        return (target == classes).float(), valid

    def _check_values(self, target: Tensor) -> None:
        allowed = [0, 1] if self.regions else list(range(self.num_heads))
        if not self.regions and self.ignore_label is not None:
            allowed.append(self.ignore_label)
        wrong = [value for value in torch.unique(target).tolist() if value not in allowed]
        if wrong:
            raise ValueError(f"the target contains the values {wrong}; allowed are {allowed} ({self})")

    def decode(self, onehot: Tensor, valid: Tensor | None = None) -> Tensor:
        """One-hot or probabilities `(B, K, *)` back to an nnU-Net target.

        Args:
            valid: bool `(B, 1, *)`; voxels where it is False get the ignore label (and need one). Default: all valid.
        Returns:
            int64 labels `(B, 1, *)`; for regions bool `(B, K[+1], *)`.
        Raises:
            ValueError: `valid` given to a label space without an ignore label.
        """
        if valid is not None and self.ignore_label is None:
            raise ValueError(f"cannot mark invalid voxels: {self} has no ignore label; call decode without `valid`")
        if not self.regions:
            labels = onehot.argmax(1, keepdim=True)
            return labels if valid is None else labels.masked_fill(~valid, self.ignore_label)
        masks = onehot > 0.5
        if self.ignore_label is None:
            return masks
        ignored = torch.zeros_like(masks[:, :1]) if valid is None else ~valid
        return torch.cat([masks, ignored], dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax or sigmoid of logits `(B, K, *)`, in float32."""
        return logits.float().sigmoid() if self.regions else logits.float().softmax(1)

    def log_probabilities(self, probabilities: Tensor) -> Tensor:
        """Finite logits `(B, K, *)`, float32 within +-16.2, whose softmax (sigmoid) is the given probability.

        Probabilities are clamped at 1e-7. Softmax heads need not sum to one: the softmax normalises them.
        """
        p = probabilities.float()
        if self.regions:
            return p.clamp(_FLOOR, 1 - _FLOOR).logit()
        return p.clamp(_FLOOR, 1).log()

    def harden(self, probabilities: Tensor) -> Tensor:
        """Most probable one-hot: argmax, or > 0.5 per region. float32 `(B, K, *)`."""
        if self.regions:
            return (probabilities > 0.5).float()
        best = probabilities.argmax(1, keepdim=True)
        return torch.zeros_like(probabilities, dtype=torch.float32).scatter_(1, best, 1.0)

    def normalized_entropy(self, probabilities: Tensor) -> Tensor:
        """Uncertainty in [0, 1], float32 `(B, 1, *)`: H / log K, or the mean over regions of binary H / log 2."""
        # Above zero by the smallest normal number: the gradient of -p log p at 0 is infinite.
        tiny = torch.finfo(torch.float32).tiny
        p = probabilities.float().clamp(tiny, 1)
        if self.regions:
            entropy = torch.special.entr(p) + torch.special.entr((1 - p).clamp(min=tiny))
            return (entropy.mean(1, keepdim=True) / math.log(2)).clamp(0, 1)
        return (torch.special.entr(p).sum(1, keepdim=True) / math.log(self.num_heads)).clamp(0, 1)

    def confidence(self, probabilities: Tensor) -> Tensor:
        """`1 - H / log K`, `(B, 1, *)` in [0, 1] (DMED-Seg, section 3.5: "the inverse of the entropy")."""
        return 1 - self.normalized_entropy(probabilities)

    def to_diffusion(self, onehot: Tensor, scale: float = 1.0) -> Tensor:
        """[0, 1] to [-scale, scale]: `scale (2 onehot - 1)`, float32. A small scale lowers the SNR at every t
        (Chen 2023, arXiv 2301.10972). Invalid voxels (all zero) become -scale in every channel."""
        return scale * (2 * onehot.float() - 1)

    def from_diffusion(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Inverse of `to_diffusion`, clamped to [0, 1] (no gradient beyond); channels are not normalised to sum one."""
        return ((x.float() / scale + 1) / 2).clamp(0, 1)
