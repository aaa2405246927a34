"""Small trainings of the latent methods: from pure noise to the masks, and nothing from images that say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Kind, dice, ready_trainer
from tiny_prior import finish
from torch import Tensor

PLAN = Kind((8, 16, 16), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), features=(8, 16, 16))
SQUARE = Kind((24, 24), ((1, 1), (2, 2), (2, 2)), features=(8, 16, 16))
BASES = ("LEAFTrainer", "TextDiffSegTrainer")
CODEC = "warmup10_lr1e-2_width1"
TOKENS = {"LEAFTrainer": "noAlign_warmup10_ema0p9", "TextDiffSegTrainer": "randomText_warmup10_lr3e-3_width1_ema0p9"}


def balls(kind: Kind, count: int, generator: torch.Generator) -> Tensor:
    """``(count, 1, *patch)``, one anywhere in each."""
    axes = torch.meshgrid(*[torch.arange(float(s)) for s in kind.patch], indexing="ij")
    radius, margin = (0.4 * kind.patch[0], 0.3) if kind.dim == 3 else (0.22 * kind.patch[0], 0.2)
    masks = []
    for _ in range(count):
        place = torch.rand(kind.dim, generator=generator).mul(1 - 2 * margin).add(margin)
        centre = [s * float(x) for s, x in zip(kind.patch, place, strict=True)]
        masks.append(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2)
    return torch.stack(masks)[:, None]


def noisy(mask: Tensor, generator: torch.Generator) -> Tensor:
    return 1.5 * mask + 0.7 * torch.randn(mask.shape, generator=generator)


def codec(kind: Kind) -> Path:
    """A trained mask autoencoder."""
    trainer = ready_trainer(CODEC, kind, base="MaskAutoencoderTrainer")
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        mask = balls(kind, 4, generator)
        trainer.train_step({"data": mask, "target": mask.short()})
    return finish(trainer)


@pytest.fixture(scope="module", autouse=True)
def codecs(folders_of_this_module: Path) -> Iterator[dict[Kind, Path]]:
    """One for each plan; the last one trained would be found by name."""
    yield {kind: codec(kind) for kind in (PLAN, SQUARE)}


def fresh(base: str, tokens: str, kind: Kind, codecs: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("nnUNet_diffext_codec", str(codecs[kind]))
    trainer = ready_trainer("_".join(filter(None, (TOKENS[base], tokens))), kind, base=base)
    trainer.start_teacher()
    return trainer


def segment(trainer: Any, image: Tensor) -> Tensor:
    """As nnU-Net's predictor: one eval pass of the averaged weights, no label anywhere near."""
    trainer.network.eval()
    with torch.no_grad(), trainer.averaged_weights():
        found = trainer.network(image).argmax(1, keepdim=True) == 1
    trainer.network.train()
    return found


@pytest.mark.parametrize(
    ("base", "tokens", "kind", "steps"),
    [
        ("LEAFTrainer", "", PLAN, 80),
        ("LEAFTrainer", "v", PLAN, 80),
        ("TextDiffSegTrainer", "", PLAN, 120),
        ("TextDiffSegTrainer", "v_1steps_TOnly", SQUARE, 160),
    ],
)
def test_overfits_two_cases_from_pure_noise(
    base: str, tokens: str, kind: Kind, steps: int, codecs: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fresh(base, tokens, kind, codecs, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    mask = balls(kind, 2, generator)
    image = noisy(mask, generator)
    assert dice(image > 0.75, mask) < 0.9, "a threshold would do: the test shows nothing"
    for _ in range(steps):
        trainer.train_step({"data": image, "target": mask.short()})
    assert dice(segment(trainer, image), mask) > 0.95


@pytest.mark.parametrize("base", BASES)
def test_image_shuffle_probe(base: str, codecs: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the labels of other images, it knows nothing; on matching ones, the same training finds new balls."""
    found: dict[bool | str, float] = {}
    for shuffled in (True, False):
        trainer = fresh(base, "", SQUARE, codecs, monkeypatch)
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            mask = balls(SQUARE, 4, generator)
            image = noisy(balls(SQUARE, 4, generator) if shuffled else mask, generator)
            trainer.train_step({"data": image, "target": mask.short()})
        mask = balls(SQUARE, 32, generator)
        prediction = segment(trainer, noisy(mask, generator))
        found[shuffled] = dice(prediction, mask)
        found[f"{shuffled}-others"] = dice(prediction, mask.roll(1, 0))
    assert found[False] > 0.9 and found["False-others"] < 0.4
    assert found[True] < 0.4 and found[True] < found["True-others"] + 0.1, "it has seen its own label"
