"""The prior networks of a PGRD training: how they are built, and which one may speak for which case."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import Tensor, nn

from nnunet_diffext.data.corruption import corrupt
from nnunet_diffext.data.splits import Split
from nnunet_diffext.networks.pgrd import PGRDNet
from nnunet_diffext.stages import Stage, StageError
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import UnknownTokenError, split_name

TRUSTED = 1.5
"""In-sample and out-of-sample errors may differ by this factor."""
BLIND_STRENGTH = 0.25
"""Corruption where no validation case tells how much is right."""


def build_prior(
    trainer_name: str, plans_manager: Any, configuration_manager: Any, input_channels: int, output_channels: int
) -> nn.Module:
    """The network of any trainer that nnU-Net can find, without deep supervision.

    Raises:
        ValueError: no such trainer.
    """
    build = _trainer_class(trainer_name).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, input_channels, output_channels, False)
    c = configuration_manager  # trainers written for nnU-Net before 2.7
    arguments = (c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import)
    return build(*arguments, input_channels, output_channels, False)


def _trainer_class(name: str) -> type:
    if split_name(name, TRAINERS) is not None:
        try:
            return find_trainer(name)
        except UnknownTokenError:
            pass  # nnU-Net has variants of its own, such as nnUNetTrainer_noDummy2DDA
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise ValueError(
            f"The prior was trained by {name}, which nnU-Net cannot find. Install the package it belongs to, or add "
            "its folder to nnUNet_extTrainer."
        ) from error


def load_prior(network: nn.Module, stage: Stage) -> None:
    """Give a prior network the weights of a finished training.

    Raises:
        StageError: they belong to another network.
    """
    here, there = ({k: tuple(v.shape) for k, v in w.items()} for w in (network.state_dict(), stage.weights))
    different = [k for k in here | there if here.get(k) != there.get(k)]
    if different:
        key = different[0]
        raise StageError(
            f"The weights of {stage.folder}, fold {stage.fold}, do not fit the network that {stage.trainer_name} "
            f"builds from these plans: {len(different)} parameters differ, the first is {key} "
            f"({there.get(key, 'missing')} in the file, {here.get(key, 'missing')} here). Train the prior with the "
            "plans of this training."
        )
    network.load_state_dict(stage.weights)


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
