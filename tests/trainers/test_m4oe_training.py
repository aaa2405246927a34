"""M4oE's trainings: every variant takes a step, and modalities are told apart by what their images look like."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import dice
from tiny_m4oe import CASES, batch_of, discs, ready, snapshot, trainer_of
from torch import Tensor

from nnunet_diffext.settings import SettingsError
from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.adam import AdamSettings
from nnunet_diffext.trainers.m4oe import NOTHING_TELLS, ONE_MODALITY
from nnunet_diffext.variants import parse_tokens

M4OE = (
    "", "woMoE", "noGN", "paper", "swinUNet", "encoderOnly", "decoderOnly", "sampleGate", "officialGate", "top1",
    "sampleGate_top1", "encoderOnly_noGN", "experts4", "balance0p01", "top1_balance0p01", "modality0", "asBackground",
    "ce1_dice0p5", "droppath0p3", "patch1", "dim12", "stages2", "depth1", "window4", "noStem", "bf16", "unionHead",
)  # fmt: skip
PRETRAIN = (
    "",
    "plain",
    "mask0p5",
    "unit1",
    "noStem",
    "droppath0p3",
    "patch1",
    "dim12",
    "stages2",
    "depth1",
    "window4",
    "5percent",
)
BY_TRAINER = {"M4oETrainer": M4OE, "M4oEPretrainTrainer": PRETRAIN}
NEED_A_STAGE = {"pretrained", "freeze_old"}


# ------------------------------------------------------------------ one step of every variant
@pytest.mark.parametrize("base", BY_TRAINER)
def test_no_token_is_forgotten_below(base: str) -> None:
    settings, tried = find_trainer(base).Settings, "_".join(filter(None, BY_TRAINER[base])).split("_")
    own = {f.name for f in fields(settings)} - {f.name for f in fields(AdamSettings)} - NEED_A_STAGE
    wanted = {f.name for f in fields(settings) if f.metadata["number"] or f.metadata["switches"]} & own
    assert wanted <= {name for token in tried for name in parse_tokens(settings, [token])}
    assert set(settings.presets) <= set(tried)


@pytest.mark.parametrize("kind", ["2d", "3d-aniso"])
@pytest.mark.parametrize(("base", "tokens"), [(base, t) for base, every in BY_TRAINER.items() for t in every])
def test_one_step_reaches_every_parameter(base: str, tokens: str, kind: str) -> None:
    if tokens == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not compute bfloat16")
    trainer = ready(tokens, kind, base=base)
    report = trainer.train_step(batch_of(trainer))
    assert report.keys() == {"loss"} | losses_of(trainer)
    assert all(torch.isfinite(torch.tensor(float(v))) for v in report.values()) and trainer.bad_steps == 0
    gradients = {name: p.grad for name, p in trainer.network.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    # two samples of two modalities, which are equally probable at first: biases balance, convolutions wait for rows
    waiting = ("modality_gate.convolutions.", "modality_gate.rows.bias")
    still = [name for name, g in gradients.items() if not (g.abs().max() > 0 or name.startswith(waiting))]
    assert still == [] or "droppath" in tokens
    trainer.network.eval()
    if base == "M4oETrainer":
        out = trainer.network(torch.randn(1, 1, *trainer.configuration_manager.patch_size))
        assert out.shape[1] == 3 and out.isfinite().all()


def losses_of(trainer: Any) -> set[str]:
    s = trainer.settings
    if trainer.base_name == "M4oEPretrainTrainer":
        return {"reconstruction"}
    gated = s.gate in ("token", "sample") and s.where != "none"
    told = s.lambda_modality > 0
    return {"sup"} | ({"balance"} if gated and s.lambda_balance else set()) | ({"modality"} if told else set())


def test_weights_of_the_losses() -> None:
    trainer = ready("balance2_modality0p5_ce0p3_dice0p2")
    report = {k: float(v) for k, v in trainer.train_step(batch_of(trainer)).items()}
    assert report["loss"] == pytest.approx(report["sup"] + 2 * report["balance"] + 0.5 * report["modality"], rel=1e-5)
    plain = ready("balance2_modality0p5_ce0p6_dice0p4")
    assert float(plain.train_step(batch_of(plain))["sup"]) == pytest.approx(2 * report["sup"], rel=1e-5)


def test_optimisers() -> None:
    adam = ready("paper").optimizer
    assert isinstance(adam, torch.optim.AdamW) and adam.param_groups[0]["weight_decay"] == 1e-4
    trainer = ready("swinUNet")
    group = trainer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert [group[k] for k in ("lr", "momentum", "weight_decay")] == [0.05, 0.9, 1e-4]
    trainer.train_step(batch_of(trainer))
    assert group["lr"] == 0.05, "no warm-up"
    for tokens, halfway in (("swinUNet_constantLR", 0.05), ("swinUNet_cosineLR", 0.025), ("swinUNet", 0.05 * 0.5**0.9)):
        trainer = ready(f"{tokens}_10epochs")
        trainer.lr_scheduler.step(5)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(halfway)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top1_noGN", "'top1' needs a gate over experts"),
        ("officialGate_top1", "'top1' needs a gate over experts"),
        ("noMAE_freezeOld", "'freezeOld' trains on from a model of nnunet_diffext add_modality"),
    ],
)
def test_contradictory_tokens(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_trainer(f"M4oETrainer_{name}")


def test_too_few_experts() -> None:
    with pytest.raises(ValueError, match="1 experts are not enough for 2 modalities"):
        ready("experts1")


# ------------------------------------------------------------------ does it learn?
ORDER = ("ct_0", "mr_0", "ct_1", "mr_1")
QUICK = "dim16_window4_patch2_warmup10_lr3e-3"


def learnt(tokens: str = QUICK, steps: int = 50, **options: Any) -> Any:
    trainer = ready(tokens, **options)
    for step in range(steps):
        trainer.train_step(discs(ORDER, step % 20))
    trainer.network.eval()
    return trainer


@pytest.fixture(scope="module")
def trained(folders_of_this_module: Path) -> Any:
    """Discs that look alike are "a" in CT and "b" in MR."""
    return learnt()


def scores(trainer: Any, modality: int | None = None) -> list[float]:
    """Dice of new cases, by modality of the image: the disc with the label that it should have."""
    batch, network = discs(ORDER, 100), trainer.network
    network.modality = modality
    with torch.no_grad():
        found = network(batch["data"]).argmax(1)
    network.modality = None
    return [
        dice(found[i] == (1 if CASES[key] == "CT" else 2), batch["target"][i, 0] > 0) for i, key in enumerate(ORDER)
    ]


def test_modalities_with_other_labels(trained: Any) -> None:
    """With the modality given, the other half of the images gets the other label, or none."""
    assert min(scores(trained, 0)[::2]) > 0.9 and min(scores(trained, 1)[1::2]) > 0.9
    assert max(scores(trained, 0)[1::2]) == max(scores(trained, 1)[::2]) == 0


def test_the_gate_tells_the_modality(trained: Any) -> None:
    assert min(scores(trained)) > 0.9
    told = trained.network.tell(discs(ORDER, 100)["data"]).exp()
    assert told.argmax(1).tolist() == [0, 1, 0, 1] and told.max(1).values.min() > 0.6


@pytest.mark.parametrize("tokens", ["", "_asBackground"])
def test_two_structures_of_which_every_case_has_one_annotated(tokens: str) -> None:
    """In one modality. As background, every second case says that the structure is not there."""
    annotated = {"ct_0": ["a"], "ct_1": ["b"]}
    trainer = learnt(QUICK + tokens, 0, diffext={"modalities": {"ct_0": "CT", "ct_1": "CT"}, "annotated": annotated})
    trainer.network.train()
    for step in range(120):
        batch = pairs(step % 20)
        for sample, wrong in zip(batch["target"], (2, 1), strict=True):
            sample[sample == wrong] = 0
        trainer.train_step(batch)
    trainer.network.eval()
    batch = pairs(100)
    with torch.no_grad():
        p = trainer.network(batch["data"]).softmax(1)
    found = [float(p[:, k][batch["target"][:, 0] == k].mean()) for k in (1, 2)]
    assert float(p[:, 0][batch["target"][:, 0] == 0].mean()) > 0.9
    if tokens:
        assert min(found) < 0.7
    else:
        assert min(found) > 0.85


def pairs(seed: int) -> dict[str, Any]:
    """A bright disc (a) and a dark one (b) in every image."""
    bright, dark = discs(("ct_0", "ct_1"), seed), discs(("ct_0", "ct_1"), seed + 1000, names={"CT": 2})
    target = torch.where(dark["target"] > 0, dark["target"], bright["target"])
    return {**bright, "data": bright["data"] - 2 * dark["data"] * (dark["target"] > 0), "target": target}


# ------------------------------------------------------------------ one modality
def initialized(tokens: str = "", **options: Any) -> tuple[Any, list[str]]:
    """A trainer, and what it printed."""
    trainer, said = trainer_of(tokens, **options), []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    trainer.initialize()
    return trainer, said


def test_single_modality() -> None:
    """Three experts, as nothing else is said; their gate has nothing to tell."""
    trainer, said = initialized(diffext=None)
    assert trainer.module.experts == 3 and trainer.module.modalities == ("MR0",)
    assert ONE_MODALITY in said and "Modalities: MR0 (3 experts)" in said
    trainer.network.train()
    batch = batch_of(trainer, ("any", "case"))
    assert trainer.train_step(batch).keys() == {"loss", "sup"}


@pytest.mark.parametrize(("tokens", "experts"), [("woMoE", 1), ("officialGate", 3), ("noGN", 1)])
def test_single_modality_without_a_gate_over_experts(tokens: str, experts: int) -> None:
    trainer, said = initialized(tokens, diffext=None)
    assert trainer.module.experts == experts and ONE_MODALITY not in said


# ------------------------------------------------------------------ does anything tell the modality?
@pytest.mark.parametrize("tokens", ["", "swinUNet", "sampleGate_top1", "encoderOnly", "woMoE", "noGN", "officialGate"])
def test_a_gate_of_its_own_does(tokens: str) -> None:
    trainer, said = initialized(tokens)
    assert trainer.module.modality_gate is not None and NOTHING_TELLS not in said


@pytest.mark.parametrize("tokens", ["modality0", "paper"])
def test_nothing_else_is_believed(tokens: str) -> None:
    """Gates over experts are no guess: every label is asked of all modalities that have it."""
    trainer, said = initialized(tokens)
    assert trainer.module.modality_gate is None and NOTHING_TELLS in said


def test_it_costs_the_network_nothing() -> None:
    """With and without it, all else starts and is trained alike, to the last bit, however large its gradient is."""
    weights = []
    for tokens in ("seed1_modality1000", "seed1_modality0"):
        trainer = ready(tokens)
        for step in range(3):
            torch.manual_seed(step)  # of stochastic depth
            trainer.train_step(batch_of(trainer, seed=step))
        weights.append(snapshot(trainer.network))
    gate = {name for name in weights[0] if name.startswith("modality_gate.")}
    assert gate and weights[0].keys() - gate == weights[1].keys()
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())


def test_recorded_in_the_plans() -> None:
    """All that prediction needs: the network is built from the plans alone."""
    trainer = ready()
    block = trainer.plans_manager.plans["diffext"]["M4oETrainer"]
    assert block["modalities"] == {"CT": [True, True, False], "MR": [True, False, True]}
    arguments = (trainer.plans_manager, trainer.configuration_manager, 1, 3, False)
    rebuilt = type(trainer).build_network_architecture(*arguments)
    assert shapes(rebuilt.state_dict()) == shapes(snapshot(trainer.network))


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in weights.items()}
