"""Settings of DMED-Seg reach what they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_batch, make_trainer, parameters_of, ready_trainer
from torch import Tensor


def losses_of(trainer: Any, batch: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return trainer.compute_losses(batch)


def test_settings_are_recorded_in_the_plans() -> None:
    trainer = make_trainer("paper_iefa0_7epochs_3iters_lr1e-3_seed5")
    recorded = trainer.plans_manager.plans["diffext"]
    assert recorded["DMEDSegTrainer"] == trainer.settings.as_dict()
    assert recorded["label_space"] == {"num_heads": 2, "regions": False, "ignore_label": None}
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.initial_lr) == (7, 3, 1e-3)
    s = recorded["DMEDSegTrainer"]
    assert (s["lambda_iefa"], s["copy_paste"], s["ema_decay"], s["momentum"], s["seed"]) == (0.0, 0.0, 0.0, 0.9, 5)
    name = "DMEDSegTrainer_paper_iefa0_7epochs_3iters_lr1e-3_seed5"
    assert Path(trainer.output_folder_base).name == f"{name}__nnUNetPlans__2d"


def test_plans_block_is_the_default_and_the_name_wins() -> None:
    plans = make_trainer().plans_manager.plans
    plans["diffext"]["DMEDSegTrainer"].update(lambda_cac=0.25, lambda_iefa=0.75)
    plans["continue_training"] = False
    trainer = make_trainer("iefa0", plans=plans)
    assert (trainer.settings.lambda_cac, trainer.settings.lambda_iefa) == (0.25, 0.0)


def test_optimizer_of_the_settings() -> None:
    trainer = ready_trainer("paper_lr1e-3_wd1e-4")
    group = trainer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (1e-3, 0.9, True, 1e-4)
    own = {id(p) for p in trainer.network.parameters()}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == own


def test_seed_of_the_name_fixes_the_initial_weights() -> None:
    a, b, c = (parameters_of(ready_trainer(t).network) for t in ("seed1", "seed1", "seed2"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize(("tokens", "labelled"), [("", 10), ("20percent", 2), ("1percent", 1), ("100percent", 10)])
def test_labeled_percent_moves_training_cases_to_the_unlabelled_ones(tokens: str, labelled: int) -> None:
    """Section 4.6; at least one label is kept, validation cases stay, and every other image remains in use."""
    trainer = make_trainer(tokens)
    folder = Path(trainer.preprocessed_dataset_folder)
    train, val = [f"case_{i:03d}" for i in range(10)], ["case_010", "case_011"]
    for name in train + val:
        (folder / f"{name}.b2nd").touch()
        (folder / f"{name}.pkl").touch()
    (folder.parent / "splits_final.json").write_text(json.dumps([{"train": train, "val": val}]))
    (folder.parent / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    trainer.initialize()
    chosen, validation = trainer.do_split()
    split, pool = trainer._split, trainer._find_pool()
    assert validation == val
    assert len(chosen) == labelled and set(chosen) <= set(train)
    assert set(split.unlabeled) == set(train) - set(chosen)
    assert len(pool.cases) == 10 - labelled


@pytest.mark.parametrize(
    ("tokens", "read", "value"),
    [
        ("", lambda n: (n.target_scale, n.noise_seed, n.schedule.name), (0.1, 0, "cosine")),
        ("bscale0p5", lambda n: n.target_scale, 0.5),
        ("noise3", lambda n: n.noise_seed, 3),
        ("linear", lambda n: n.schedule.name, "linear"),
        ("featuresOnly", lambda n: n.fusion.fuse_predictions, False),
        ("fixedAverage", lambda n: n.fusion, None),
        ("halfDE", lambda n: len(n.de.encoder), 2),
        ("CEonly", lambda n: n.de, None),
        ("DEonly", lambda n: n.ce, None),
        ("", lambda n: n.project, None),
    ],
)
def test_settings_reach_the_network(tokens: str, read: Any, value: Any) -> None:
    assert read(ready_trainer(tokens).network) == value


@pytest.mark.parametrize(("tokens", "term"), [("tau0p5", "iefa"), ("recycle", "diffusion")])
def test_settings_reach_the_losses(tokens: str, term: str) -> None:
    """Same weights, batch and random numbers: that term changes."""
    plain, other = ready_trainer("IEFA_noEMA"), ready_trainer(f"IEFA_noEMA_{tokens}")
    other.network.load_state_dict(plain.network.state_dict())
    batch = make_batch(plain)
    a, b = losses_of(plain, batch), losses_of(other, batch)
    assert torch.equal(a["sup"], b["sup"]) and not torch.equal(a[term], b[term])
