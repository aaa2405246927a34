"""A trained M4oE of CT and MR, and a dataset with a third modality, US, for the tests of add_modality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_dataset_json, make_plans
from tiny_m4oe import CASES, LABELS, TWO, batch_of, ready
from tiny_prior import finish
from torch import Tensor, nn

from nnunet_diffext.networks.blocks.experts import ModalityExperts
from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.m4oe_growth import Growth, add_modality

MORE = "Dataset998_More"
NEW_CASES = {**CASES, "us_0": "US", "us_1": "US"}
NEW_LABELS = {**LABELS, "c": 3}
THREE = {"modalities": NEW_CASES, "annotated": {**TWO["annotated"], "US": ["a", "c"]}}


def prepare(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset with the new modality, in nnU-Net's folders of one test."""
    monkeypatch.delenv("nnUNet_diffext_pretraining", raising=False)
    folder = folders["nnUNet_preprocessed"] / MORE
    (folder / "nnUNetPlans_tiny").mkdir(parents=True)
    (folder / "nnUNetPlans_tiny" / "us_0.b2nd").touch()
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans("2d")))
    write(NEW_LABELS, THREE)


def write(labels: dict[str, Any], diffext: dict[str, Any]) -> dict[str, Any]:
    """``dataset.json`` of the dataset with the new modality."""
    from nnunetv2 import paths

    content = make_dataset_json(labels, 1, diffext)
    (Path(paths.nnUNet_preprocessed) / MORE / "dataset.json").write_text(json.dumps(content))
    return content


def trained(tokens: str = "", **options: Any) -> tuple[Path, Any]:
    """A model after two steps, whose gates are no longer zero."""
    trainer = ready(tokens, **options)
    for step in range(2):
        trainer.train_step(batch_of(trainer, seed=step))
    return finish(trainer), trainer


def grown(folder: Path, tmp_path: Path) -> Growth:
    return add_modality(folder, MORE, tmp_path / "larger", [0])


def trainer_for(growth: Growth, token: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the printed command trains."""
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(growth.folder))
    plans = {**make_plans("2d"), "dataset_name": MORE}
    name = "_".join([growth.trainer, *filter(None, [token])])
    trainer = find_trainer(name)(plans, "2d", 0, make_dataset_json(NEW_LABELS, 1, THREE), torch.device("cpu"))
    trainer.initialize()
    trainer.network.train()
    return trainer


@torch.no_grad()
def predict(network: nn.Module, modality: int, image: Tensor) -> Tensor:
    network.eval().modality = modality
    return network(image)


def rows(network: nn.Module) -> set[str]:
    """Parameters whose first axis is the expert."""
    found = {name for name, _ in network.named_parameters() if name.startswith("modality_gate.rows.")}
    for name, module in network.named_modules():
        if isinstance(module, ModalityExperts):
            found |= {f"{name}.{key}" for key in module.stacked}
            found |= {f"{name}.gate.weight", f"{name}.gate.bias"} if module.weighs else set()
    return found
