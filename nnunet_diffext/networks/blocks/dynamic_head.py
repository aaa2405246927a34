"""M4oE's dynamic selection head: a projection per modality, written into the labels of all modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunet_diffext.diffusion import LabelSpace

_ABSENT = -1e4
"""Logit of a class that a modality does not have, in training: probability exactly 0, and finite in half precision.
(The authors' code pads with 0, which beats every negative logit.)"""
_ABSENT_LOG = -32.0
"""The same beside log-probabilities: nnU-Net adds up predictions in half precision, times 10; 1e-14 is left of it."""


class DynamicHead(nn.Module):
    """Projections of the last tokens to the classes that each modality has.

    Args:
        width: channels of a token.
        label_space: the K heads of all modalities together.
        classes: for every modality, which of the K heads it has.
        shared: one projection to all K heads, of which a modality uses its own, instead of one per modality.
    Raises:
        ValueError: a modality without two classes (regions: one), or without the background; a wrong number of heads; a
            head that no modality has.
    """

    def __init__(
        self, width: int, label_space: LabelSpace, classes: Sequence[Sequence[bool]], *, shared: bool = False
    ) -> None:
        super().__init__()
        self.label_space, self.shared = label_space, shared
        _check(label_space, classes)
        self.classes = [[k for k, has in enumerate(own) if has] for own in classes]
        sizes = [label_space.num_heads] if shared else [len(own) for own in self.classes]
        self.seg_layers = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """Logits ``(B, K, *patch)`` of every sample's own modality.

        Args:
            tokens: ``(B, *patch, width)``.
            modality: ``(B,)``.
        """
        return self._select(tokens, modality, lambda logits: logits, _ABSENT)

    def log_probabilities(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """The same as bounded log-probabilities, for prediction."""

        def read(own: Tensor) -> Tensor:
            return self.label_space.log_probabilities(self.label_space.probabilities(own))

        return self._select(tokens, modality, read, _ABSENT_LOG)

    def guessed(self, tokens: Tensor, modality: Tensor) -> Tensor:
        """The same where the modality is a guess, which excludes nothing: tiles that guess differently weigh the same
        when nnU-Net averages them.
        """
        return self.label_space.log_probabilities(
            self._select(tokens, modality, self.label_space.probabilities, absent=0.0)
        )

    def union(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Log-probabilities ``(B, K, *patch)`` where nothing tells the modality: of all labels that anybody knows.

        For every label the mean of the modalities that have it: the background of the others says nothing about it.
        What the labels leave is background.

        Args:
            tokens: ``(B, *patch, width)``.
            asked: which modalities count, bool ``(modalities,)``.
        """
        counts, total = asked.float(), 0.0
        for m, count in enumerate(counts.unbind()):
            total = total + count * self._spread(self.label_space.probabilities(self._own(tokens, m)), m, 0.0)
        has = [[k in own for k in range(self.label_space.num_heads)] for own in self.classes]
        asked_of = counts @ counts.new_tensor(has)
        mean = total / asked_of.clamp_min(1).view(-1, *(1,) * (total.ndim - 2))
        if not self.label_space.regions:
            foreground = mean[:, 1:]
            mean = torch.cat([(1 - foreground.sum(1, keepdim=True)).clamp_min(0), foreground], dim=1)
            mean = mean / mean.sum(1, keepdim=True)
        return self.label_space.log_probabilities(mean)

    def only_of(self, m: int) -> tuple[nn.Linear, list[int]]:
        """The projection of modality m, and its rows that no other modality uses."""
        if not self.shared:
            return self.seg_layers[m], list(range(len(self.classes[m])))
        others = {k for other, own in enumerate(self.classes) for k in own if other != m}
        return self.seg_layers[0], [k for k in self.classes[m] if k not in others]

    def _own(self, tokens: Tensor, m: int) -> Tensor:
        """Logits ``(B, C_m, *patch)`` of modality m's classes."""
        if not self.shared:
            return self.seg_layers[m](tokens).movedim(-1, 1)
        layer, own = self.seg_layers[0], self.classes[m]  # other modalities' rows do not decide how these are rounded
        return nn.functional.linear(tokens, layer.weight[own], layer.bias[own]).movedim(-1, 1)

    def _spread(self, own: Tensor, m: int, absent: float) -> Tensor:
        """Modality m's classes ``(B, C_m, *)`` among all ``(B, K, *)``."""
        union = own.new_full((len(own), self.label_space.num_heads, *own.shape[2:]), absent)
        union[:, self.classes[m]] = own
        return union

    def _select(self, tokens: Tensor, modality: Tensor, read: Callable[[Tensor], Tensor], absent: float) -> Tensor:
        """All heads on all samples, which is cheap: every head gets a gradient, if only zeros, as DDP demands."""
        chosen: Tensor | None = None
        for m in range(len(self.classes)):
            union = self._spread(read(self._own(tokens, m)), m, absent)
            is_own = (modality == m).view(-1, *(1,) * (union.ndim - 1))
            chosen = union if chosen is None else torch.where(is_own, union, chosen)
        return chosen


def _check(label_space: LabelSpace, classes: Sequence[Sequence[bool]]) -> None:
    """What :class:`DynamicHead` raises."""
    heads, regions = label_space.num_heads, label_space.regions
    for m, own in enumerate(classes):
        if len(own) != heads:
            raise ValueError(f"Modality {m} names {len(own)} heads, but there are {heads}.")
        if sum(own) < (1 if regions else 2) or not (regions or own[0]):
            needed = "a region" if regions else "background and another class"
            raise ValueError(f"Modality {m} needs {needed}, but has {list(own)}.")
    missing = [k for k in range(heads) if not any(own[k] for own in classes)]
    if missing:
        raise ValueError(f"No modality has the heads {missing}: they could never be predicted.")
