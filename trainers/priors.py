"""The prior networks of a PGRD training: which one may speak for which case, and how wrong it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_pool3d

from nnunet_diffext.data.corruption import corrupt, matching_strength
from nnunet_diffext.data.splits import Split
from nnunet_diffext.diffusion.residual import prior_residual_scale
from nnunet_diffext.networks.pgrd import PGRDNet
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import split_name

BAND = 3
"""Voxels around the foreground in which a prior's errors are measured."""
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
    if split_name(trainer_name, TRAINERS) is not None:
        trainer = find_trainer(trainer_name)
    else:
        trainer = recursive_find_trainer_class_by_name(trainer_name)
    if trainer is None:
        raise ValueError(
            f"The prior was trained by {trainer_name}, which nnU-Net cannot find. Install the package it belongs to, "
            "or add its folder to nnUNet_extTrainer."
        )
    build = trainer.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, input_channels, output_channels, False)
    c = configuration_manager  # trainers written for nnU-Net before 2.7
    arguments = (c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import)
    return build(*arguments, input_channels, output_channels, False)


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
    def logits(self, image: Tensor, keys: Sequence[str] = ()) -> Tensor:
        """Logits ``(B, K, *)`` of the prior that speaks for each case of the batch, float32."""
        if self.kind != "oof" or not keys:
            return self.network.prior(image).float()
        rows = [self.networks[self.fold_of[key]](image[i : i + 1]) for i, key in enumerate(keys)]
        return torch.cat(rows).float()

    @torch.no_grad()
    def __call__(self, image: Tensor, keys: Sequence[str] = ()) -> Tensor | None:
        """pi ``(B, K, *)`` for a training batch; ``None`` where the network's own will do."""
        if self.network.prior is None or self.kind == "insample":
            return None
        logits = self.logits(image, keys)
        if self.kind == "corrupted":
            logits = corrupt(logits, self.strength)
        return self.network.as_prior(logits)


class ErrorSample:
    """Logits and labels of a few batches, to measure a prior's error on again and again."""

    def __init__(self, network: PGRDNet) -> None:
        self.network = network
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, clean: Tensor, valid: Tensor) -> None:
        """One batch; ``clean`` ``(B, K, *)``, ``valid`` ``(B, 1, *)``."""
        self.batches.append((logits.cpu(), clean.cpu(), valid.cpu()))

    def residuals(self, strength: float = 0.0) -> tuple[float, float, float]:
        """Mean ``|y - pi|`` and kappa in the band around the foreground, and the RMS of ``y - pi`` everywhere."""
        absolute, scale, everywhere = [], [], []
        state = torch.get_rng_state()
        torch.manual_seed(0)  # the same displacement at every strength
        for logits, clean, valid in self.batches:
            residual = clean - self.network.as_prior(corrupt(logits, strength))
            band = around_foreground(clean, self.network.label_space.regions) * valid
            everywhere.append(prior_residual_scale(residual, valid.float()))
            if band.any():
                absolute.append((residual.abs() * band).sum() / (band.sum() * residual.shape[1]))
                scale.append(prior_residual_scale(residual, band))
        torch.set_rng_state(state)
        if not absolute:
            return float("nan"), float("nan"), float("nan")
        return tuple(float(torch.stack(v).nanmean()) for v in (absolute, scale, everywhere))

    def strength_for(self, wanted: float) -> float:
        """Corruption strength at which the mean ``|y - pi|`` is ``wanted``."""
        return matching_strength(lambda strength: self.residuals(strength)[0], wanted)


def around_foreground(clean: Tensor, regions: bool) -> Tensor:
    """1 within :data:`BAND` voxels of the foreground, ``(B, 1, *)``; ``clean`` is one-hot ``(B, K, *)``."""
    foreground = (clean if regions else clean[:, 1:]).amax(1, keepdim=True)
    pool = max_pool3d if clean.ndim == 5 else max_pool2d
    return pool(foreground, 2 * BAND + 1, stride=1, padding=BAND)
