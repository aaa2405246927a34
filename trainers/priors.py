"""The prior networks of a PGRD training: how they are built, and which one may speak for which case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nnunet_diffext.data.corruption import corrupt
from nnunet_diffext.data.splits import Split
from nnunet_diffext.networks.pgrd import PGRDNet

TRUSTED = 1.5
"""In-sample and out-of-sample errors may differ by this factor."""
BLIND_STRENGTH = 0.25
"""Corruption where no validation case tells how much is right."""


def out_of_fold(train: Sequence[str], splits: Mapping[int, Split]) -> dict[str, int]:
    """Case -> a fold whose prior has not seen it, for the cases that have one.

    Args:
        train: training cases of the fold at hand.
        splits: the folds with a finished prior.
    """
    found = {}
    for case in train:
        folds = [k for k, split in splits.items() if case not in split.train and case not in split.unlabeled]
        if folds:
            found[case] = folds[0]
    return found


class PriorBank:
    """Gives training batches a prior that errs as it will err on new images.

    Args:
        network: holds the prior of this fold.
        kind: ``"insample"``, ``"corrupted"`` or ``"oof"``.
        networks: priors by fold, for ``"oof"``.
        fold_of: case -> fold, for ``"oof"``.
        strength: of the corruption, in [0, 1].
    """

    def __init__(
        self,
        network: PGRDNet,
        kind: str = "insample",
        networks: Mapping[int, nn.Module] | None = None,
        fold_of: Mapping[str, int] | None = None,
        strength: float = 0.0,
    ) -> None:
        self.network, self.kind, self.strength = network, kind, strength
        self.networks, self.fold_of = dict(networks or {}), dict(fold_of or {})

    @torch.no_grad()
    def logits(self, image: Tensor, keys: Sequence[str]) -> Tensor:
        """Logits ``(B, K, *)`` of the prior that speaks for each of the training cases ``keys``, float32."""
        if self.kind != "oof":
            return self.network.prior(image).float()
        rows = [self.networks[self.fold_of[key]](image[i : i + 1]) for i, key in enumerate(keys)]
        return torch.cat(rows).float()

    @torch.no_grad()
    def __call__(self, image: Tensor, keys: Sequence[str]) -> Tensor | None:
        """pi ``(B, K, *)`` for a batch of the training cases ``keys``; ``None`` where the network's own will do."""
        if self.kind == "insample":
            return None
        logits = self.logits(image, keys)
        if self.kind == "corrupted":
            logits = corrupt(logits, self.strength)
        return self.network.as_prior(logits)
