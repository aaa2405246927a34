"""What M4oE's trainer reports about its experts after every epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_m4oe import batch_of, ready


def epoch(tokens: str = "", starved: bool = False, **options: Any) -> tuple[Any, list[str]]:
    """An epoch of two steps, and what was printed at its end."""
    trainer = ready(tokens, **options)
    if starved:
        with torch.no_grad():
            for name, p in trainer.network.named_parameters():
                if name.endswith("gate.bias"):
                    p[1] = -20
    keys = ("ct_0", "mr_0") if options.get("diffext", True) else ("x", "y")
    trainer.on_train_epoch_start()
    reports = [trainer.train_step(batch_of(trainer, keys, seed=step)) for step in range(2)]
    said: list[str] = []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    trainer.on_train_epoch_end(reports)
    return trainer, said


def usage_of(trainer: Any) -> dict[str, Any]:
    return json.loads((Path(trainer.output_folder) / "expert_usage.json").read_text())


def test_usage_is_written_and_drawn() -> None:
    trainer, said = epoch()
    content = usage_of(trainer)
    levels = len(trainer.network.encoder.levels)
    assert content["layers"] == [f"encoder {i}" for i in range(2 * levels)] + [
        f"decoder {i}" for i in range(2 * levels - 2)
    ]
    assert list(content["usage"]) == ["CT", "MR"] and all(
        len(u) == len(content["layers"]) for u in content["usage"].values()
    )
    assert all(sum(row) == pytest.approx(1, abs=1e-4) for u in content["usage"].values() for row in u)
    assert (Path(trainer.output_folder) / "expert_usage.png").read_bytes()[:4] == b"\x89PNG"
    assert trainer.logger.local_logger.my_fantastic_logging["modality_told"] == [content["told"]]
    assert not any("WARNING" in line for line in said)


def test_starved_expert_is_reported() -> None:
    _, said = epoch(starved=True)
    assert sum("WARNING: expert 1 (of MR) gets less than 5.0% of the weight" in line for line in said) == 1


def test_counted_anew_in_every_epoch() -> None:
    trainer, _ = epoch()
    trainer.on_train_epoch_start()
    assert trainer.usage.empty
    report = trainer.train_step(batch_of(trainer, ("mr_0", "mr_1")))
    trainer.on_train_epoch_end([report])
    assert list(usage_of(trainer)["usage"]) == ["MR"]


@pytest.mark.parametrize("tokens", ["woMoE", "noGN", "officialGate"])
def test_nothing_to_report_without_gates(tokens: str) -> None:
    trainer, _ = epoch(tokens)
    assert not (Path(trainer.output_folder) / "expert_usage.json").exists()
    assert len(trainer.logger.local_logger.my_fantastic_logging["modality_told"]) == 1, "but how often it was told"


def test_where_nothing_tells_the_modality() -> None:
    trainer, _ = epoch("modality0")
    assert usage_of(trainer)["told"] is None
    assert "modality_told" not in trainer.logger.local_logger.my_fantastic_logging


def test_single_modality() -> None:
    trainer, _ = epoch("seed1", diffext=None)
    content = usage_of(trainer)
    assert content["experts"] == 3 and list(content["usage"]) == ["MR0"]
