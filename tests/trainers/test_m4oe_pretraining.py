"""Phase 1 of M4oE: images only, every modality trains its own experts, and what its validation writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_m4oe import batch_of, discs, ready

ORDER = ("ct_0", "mr_0", "ct_1", "mr_1")


def pretraining(tokens: str = "", **options: Any) -> Any:
    return ready(tokens, base="M4oEPretrainTrainer", **options)


def test_labels_are_never_read() -> None:
    trainer = pretraining()
    errors = []
    for target in (torch.zeros(1), None):
        torch.manual_seed(0)
        batch = {**batch_of(trainer), "target": target}
        errors.append(float(trainer.compute_losses(batch)["reconstruction"].detach()))
    assert errors[0] == errors[1] > 0.5


def test_every_modality_trains_its_own_experts() -> None:
    """METHODS 4.5-3: a batch of CT leaves MR's experts alone; the attention learns from both."""
    trainer = pretraining()
    trainer.train_step(batch_of(trainer, ("ct_0", "ct_1")))
    seen = 0
    for name, p in trainer.network.named_parameters():
        if name.startswith("encoder") and ".ffn." in name:
            assert p.grad[0].abs().max() > 0 and p.grad[1].abs().max() == 0, name
            seen += 1
        elif "qkv.weight" in name:
            assert p.grad.abs().max() > 0
    assert seen == 4 * 2 * len(trainer.network.encoder.levels)


def test_unlabelled_images_count() -> None:
    """In the expert of their own modality, in the weak view."""
    trainer = pretraining()
    batch = batch_of(trainer, ("ct_0", "ct_1"))
    weak, strong = torch.randn(2, 1, 16, 24), torch.full((2, 1, 16, 24), torch.nan)
    batch |= {"unlabeled": torch.cat([weak, strong], 1), "unlabeled_keys": np.array(["mr_0", "mr_1"])}
    assert torch.isfinite(torch.as_tensor(trainer.train_step(batch)["loss"]))
    experts = [p for name, p in trainer.network.encoder.named_parameters() if name.endswith("weight_in")]
    assert all((p.grad.abs().amax((1, 2)) > 0).all() for p in experts)


def test_learns_to_reconstruct() -> None:
    """Better than the mean of every image, which would explain none of its variance."""
    trainer = pretraining("mask0p5_unit1_dim16_warmup5_lr3e-3")
    for step in range(60):
        trainer.train_step(discs(ORDER, step % 20))
    trainer.network.eval()
    with torch.no_grad():
        outputs = [trainer.validation_step(discs(ORDER, seed)) for seed in (100, 101)]
    trainer.on_validation_epoch_end(outputs)
    curves = trainer.logger.local_logger.my_fantastic_logging
    assert 0.25 < curves["mean_fg_dice"][-1] < 1
    error, variance = (np.mean([float(o[key]) for o in outputs]) for key in ("loss", "variance"))
    assert curves["mean_fg_dice"][-1] == pytest.approx(1 - error / variance, rel=1e-5)
    assert curves["val_losses"][-1] == pytest.approx(error, rel=1e-5)
    trainer.perform_actual_validation()
    file = Path(trainer.output_folder) / "validation" / "reconstruction.json"
    assert json.loads(file.read_text()) == {"explained_variance": pytest.approx(curves["mean_fg_dice"][-1])}


@torch.no_grad()
def test_variance_by_hand() -> None:
    """Of every channel of every image around its own mean: a constant image has none, whatever its value."""
    trainer = pretraining()
    trainer.network.eval()
    batch = {**batch_of(trainer, ORDER), "data": torch.full((4, 1, 16, 24), 100.0)}
    assert trainer.validation_step(batch)["variance"] == 0
    batch["data"][..., ::2] = 0
    assert trainer.validation_step(batch)["variance"] == pytest.approx(2500, rel=1e-2)


def test_nothing_to_write_before_the_first_validation() -> None:
    trainer = pretraining("seed5")
    trainer.perform_actual_validation()
    assert not (Path(trainer.output_folder) / "validation").exists()


def test_cannot_segment() -> None:
    with pytest.raises(TypeError, match="-tr M4oETrainer"):
        pretraining().network.eval()(torch.randn(1, 1, 16, 24))
