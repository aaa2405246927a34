"""Trainings on two modalities of a few kilobytes: CT, where discs are called "a", and MR, where they are called "b"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tiny import KINDS, Kind, make_batch, make_trainer
from torch import Tensor

LABELS = {"background": 0, "a": 1, "b": 2}
CASES = {"ct_0": "CT", "ct_1": "CT", "mr_0": "MR", "mr_1": "MR"}
TWO = {"modalities": CASES, "annotated": {"CT": ["a"], "MR": ["b"]}}
KEYS = ("ct_0", "mr_0")
SMALL = {"dim": "dim8", "window": "window3", "droppath": "droppath0"}
"""Unless a variant says otherwise. Stochastic depth would leave whole blocks without gradient."""


def trainer_of(
    tokens: str = "", kind: str | Kind = "2d", *, base: str = "M4oETrainer", mae: bool = False, **options: Any
) -> Any:
    """A trainer that is not initialised; M4oE's without phase 1, unless ``mae``."""
    parts = [token for start, token in SMALL.items() if start not in tokens]
    parts += ["noMAE"] if base == "M4oETrainer" and not mae else []
    options = {"labels": LABELS, "diffext": TWO, **options}
    return make_trainer("_".join([*parts, *filter(None, [tokens])]), kind, base=base, **options)


def ready(tokens: str = "", kind: str | Kind = "2d", **options: Any) -> Any:
    """As :func:`trainer_of`, with network and optimiser, in training mode."""
    trainer = trainer_of(tokens, kind, **options)
    trainer.initialize()
    trainer.network.train()
    return trainer


def batch_of(trainer: Any, keys: Sequence[str] = KEYS, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Noise, labelled at random with what is annotated in every case."""
    batch = make_batch(trainer, batch=len(keys), unlabeled=False, seed=seed, **options)
    for sample, key in zip(batch["target"], keys, strict=True):
        known = torch.tensor(trainer.cases.annotated(key))
        if trainer.label_space.regions:
            sample[: len(known)] &= known.view(-1, *(1,) * (sample.ndim - 1))
        else:
            sample[~known[sample.long().clamp(max=len(known) - 1)] & (sample < len(known))] = 0
    return {**batch, "keys": list(keys)}


def discs(keys: Sequence[str], seed: int, kind: str = "2d", names: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A bright disc on a dark ground in CT, on stripes in MR. ``names``: label of a disc by modality."""
    generator = torch.Generator().manual_seed(seed)
    shape, images, targets = KINDS[kind].patch, [], []
    names = names or {"CT": 1, "MR": 2}
    axes = torch.meshgrid(*[torch.arange(float(s)) for s in shape], indexing="ij")
    for key in keys:
        centre = [s * (0.3 + 0.4 * float(torch.rand((), generator=generator))) for s in shape]
        inside = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)).sqrt() < 0.3 * min(shape[-2:])
        image = 0.3 * torch.randn(shape, generator=generator) + 3.0 * inside
        if CASES[key] == "MR":
            image = image + (axes[-1] % 4 < 2).float()
        images.append(image[None])
        targets.append(names[CASES[key]] * inside[None].short())
    return {"data": torch.stack(images), "target": torch.stack(targets), "keys": list(keys)}


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in network.state_dict().items()}
