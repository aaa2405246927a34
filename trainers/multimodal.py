"""Trainings on several modalities: which one every sample has, and which labels somebody looked for in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nnunet_diffext.data.modalities import Modalities, modalities_of
from nnunet_diffext.settings import PLANS_KEY, default_of, setting
from nnunet_diffext.trainers.adam import AdamSettings
from nnunet_diffext.trainers.base import DiffextTrainer
from nnunet_diffext.trainers.configured import CUDA

SIZE = ("embed_stride", "embed_dim", "stages", "depth", "window", "stem")
"""Settings that both trainings must agree on."""


@dataclass(frozen=True, kw_only=True)
class SwinSettings(AdamSettings):
    """Settings of M4oE's network, which both of its trainings share. "Paper" is Jiang and Shen, MICCAI 2024."""

    modalities: dict | None = setting(None, "modality -> which heads it has; filled in from dataset.json")
    embed_stride: int | None = setting(
        None,
        "at most so many voxels per token in every axis, the planned strides decide; none: 4 in 2D (paper), 2 in 3D",
        number="patch#", minimum=1,
    )  # fmt: skip
    embed_dim: int | None = setting(
        None, "channels of the finest tokens; none: 96 in 2D (paper), 48 in 3D", number="dim#", minimum=4
    )
    stages: int = setting(4, "levels of the encoder at most; the plans may have fewer", number="stages#", minimum=2)
    depth: int = setting(2, "Swin blocks per level", number="depth#", minimum=1)
    window: int = setting(7, "tokens of a window per axis, snapped to the grid", number="window#", minimum=2)
    stem: bool = setting(
        True,
        "convolutions at the resolution of the image, before the tokens and behind the decoder (none in the paper)",
        switches={"noStem": False},
    )  # fmt: skip

    def network_arguments(self) -> dict[str, Any]:
        """Of the Swin encoder, by name."""
        return {name: getattr(self, name) for name in (*SIZE, "drop_path")}

    def size_tokens(self) -> list[str]:
        """What a trainer's name needs for a network of the same size."""
        sizes = [f for f in fields(self) if f.name in SIZE and getattr(self, f.name) != default_of(f)]
        numbers = [f.metadata["number"].replace("#", str(getattr(self, f.name))) for f in sizes if f.metadata["number"]]
        return [*numbers, *(token for f in sizes for token in f.metadata["switches"])]


class MultimodalTrainer(DiffextTrainer):
    """Adds the modality and the annotated labels of every sample, from ``dataset.json["diffext"]``.

    The settings of a subclass are :class:`SwinSettings`; their ``modalities`` are filled in here.
    """

    cases: Modalities | None = None

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.cases = modalities_of(dataset_json)
        known = self.from_dataset(dataset_json)
        self.settings = replace(self.settings, **known)
        self.plans_manager.plans[PLANS_KEY][self.base_name].update(known)

    @classmethod
    def from_dataset(cls, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
        """The modalities and their heads."""
        cases = modalities_of(dataset_json)
        return {"modalities": {name: list(cases.classes(name)) for name in cases.names}}

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split. A case without a modality is reported before any work is done."""
        train, val = super().do_split()
        for case in (*train, *val):
            self.cases.index(case)
        return train, val

    def modality_of(self, keys: list[str] | None, batch_size: int) -> Tensor:
        """Index of every sample's modality ``(B,)``, on the training device."""
        if self.cases is None or keys is None:  # a planner's batch is of no dataset
            return torch.zeros(batch_size, dtype=torch.long, device=self.device)
        return torch.tensor([self.cases.index(key) for key in keys], device=self.device)

    def annotated_in(self, keys: list[str] | None, batch_size: int) -> Tensor:
        """Which heads are annotated in every sample, bool ``(B, K)``."""
        if self.cases is None or keys is None:
            return torch.ones(batch_size, self.label_space.num_heads, dtype=torch.bool, device=self.device)
        return torch.tensor([self.cases.annotated(key) for key in keys], device=self.device)
