"""A finished training on disk that PGRD can build on, without any data: a network as it was initialised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import Kind, make_trainer
from torch import nn

from nnunet_diffext.stages import FINAL


def finish(trainer: Any) -> Path:
    """Leave what a finished training leaves in its model folder. Returns that folder."""
    model = Path(trainer.output_folder_base)
    model.mkdir(parents=True, exist_ok=True)
    (model / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (model / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / FINAL))
    return model


def save_prior(
    tokens: str = "", kind: str | Kind = "2d", *, base: str = "nnUNetTrainer", gain: float = 1.0, **options: Any
) -> tuple[Path, nn.Module]:
    """Model folder and network of an untrained prior.

    Args:
        tokens, kind, base, options: see ``make_trainer``.
        gain: factor of all weights, so that priors differ.
    """
    trainer = make_trainer(tokens, kind, base=base, **options)
    trainer.initialize()
    for p in trainer.network.parameters():
        p.data.mul_(gain)
    return finish(trainer), trainer.network.eval()
