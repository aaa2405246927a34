"""M4oE's second phase starts from the first: what is taken over, what is not, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_trainer, ready_trainer
from tiny_m4oe import CASES, LABELS, TWO, batch_of, ready, snapshot, trainer_of
from tiny_prior import finish

from nnunet_diffext.networks.blocks.experts import ModalityExperts
from nnunet_diffext.stages import FINAL, StageError

OTHERS = {"modalities": {case: "PET" if name == "MR" else name for case, name in CASES.items()}, "annotated": {}}
PRETRAIN = "M4oEPretrainTrainer"


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test."""
    monkeypatch.delenv("nnUNet_diffext_pretraining", raising=False)


def pretrain(tokens: str = "", monkeypatch: Any = None, steps: int = 1, **options: Any) -> tuple[Path, Any]:
    """A model folder of phase 1. With variant tokens it is named by the variable."""
    trainer = ready(tokens, base=PRETRAIN, **options)
    for step in range(steps):
        trainer.train_step(batch_of(trainer, seed=step))
    folder = finish(trainer)
    if monkeypatch is not None:
        monkeypatch.setenv("nnUNet_diffext_pretraining", str(folder))
    return folder, trainer


def refused(match: str, tokens: str = "", **options: Any) -> str:
    trainer = trainer_of(tokens, mae=True, **options)
    with pytest.raises(StageError, match=match) as caught:
        trainer.initialize()
    return str(caught.value)


def expert_tensors(weights: dict[str, torch.Tensor]) -> list[str]:
    return [k for k in weights if k.rpartition(".")[2] in ModalityExperts.stacked]


# ------------------------------------------------------------------ what is taken over
@pytest.mark.parametrize("kind", ["2d", "3d-aniso"])
def test_encoder_and_experts_start_from_phase_1(
    kind: str, monkeypatch: pytest.MonkeyPatch, nnunet_folders: dict[str, Path]
) -> None:
    """All of them; gates, decoder and head are what they would be without phase 1 (METHODS 4.5-4)."""
    folder, before = pretrain(monkeypatch=monkeypatch, kind=kind)
    given = {k.removeprefix("encoder."): v for k, v in before.network.state_dict().items() if k.startswith("encoder.")}
    trainer, fresh = ready(mae=True, kind=kind), ready(kind=kind)
    own, untouched = snapshot(trainer.network), snapshot(fresh.network)
    assert expert_tensors(given) and all(torch.equal(own[f"encoder.{k}"], v) for k, v in given.items())
    rest = {k for k in own if k.removeprefix("encoder.") not in given or not k.startswith("encoder.")}
    assert all(torch.equal(own[k], untouched[k]) for k in rest)
    gates = [k for k in rest if k.startswith("encoder.")]
    assert gates and all(".gate." in k and own[k].abs().max() == 0 for k in gates)
    assert any(not torch.equal(own[f"encoder.{k}"], untouched[f"encoder.{k}"]) for k in expert_tensors(given))
    assert trainer.settings.pretraining_trainer == before.__class__.__name__
    trainer.train_step(batch_of(trainer))


def test_what_was_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = pretrain(monkeypatch=monkeypatch)
    trainer, said = trainer_of(mae=True), []
    trainer.print_to_log_file = lambda *text, **_: said.append(" ".join(map(str, text)))
    trainer.initialize()
    encoder, all_of_it = (len(m.state_dict()) for m in (trainer.network.encoder, trainer.network))
    gates = 2 * 2 * len(trainer.network.encoder.levels)
    experts = 4 * 2 * len(trainer.network.encoder.levels)
    assert f"Pretraining: {folder}, fold 0." in said
    assert (
        f"Loaded {encoder - gates} of {encoder} tensors of the encoder, {experts} of them of experts. Not in the "
        f"pre-training, and new: {gates} tensors of the encoder's gates, {all_of_it - encoder} outside of the encoder."
    ) in said


def test_found_by_name() -> None:
    """Without the variable, the training of the same plans, configuration and fold."""
    options = {"labels": LABELS, "diffext": TWO}
    before = make_trainer("", "2d", base=PRETRAIN, **options)
    before.initialize()
    assert finish(before).name == f"{PRETRAIN}__nnUNetPlans__2d"
    trainer = make_trainer("2epochs", "2d", base="M4oETrainer", **options)
    trainer.initialize()
    weights = trainer.network.encoder.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in before.network.encoder.state_dict().items())
    assert trainer.settings.pretraining_trainer == PRETRAIN


@pytest.mark.parametrize("tokens", ["woMoE", "decoderOnly"])
def test_encoder_without_experts(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = pretrain("plain", monkeypatch)
    own = ready(tokens, mae=True).network.encoder.state_dict()
    assert all(torch.equal(before.network.encoder.state_dict()[k], v) for k, v in own.items())
    pretrain("", monkeypatch)
    refused("a network without experts in its encoder needs M4oEPretrainTrainer_plain", tokens)


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        ("", "dim8_window3"),
        ("noStem", "dim8_window3_noStem"),
        ("paper", "dim8_window3_noStem"),
        ("woMoE_stages3", "plain_dim8_stages3_window3"),
    ],
)
def test_phase_1_of_another_network_is_looked_for(tokens: str, name: str) -> None:
    assert f" {PRETRAIN}_{name} " in refused(PRETRAIN, tokens)


@pytest.mark.parametrize("diffext", [None, TWO])
def test_experts_that_phase_1_does_not_have(diffext: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are noisy copies, the same in every process of a distributed training, whatever its random numbers are."""
    folder, before = pretrain(monkeypatch=monkeypatch, diffext=diffext)
    there = before.module.experts
    trainers, drawn = [], set()
    for seed in (1, 2):
        trainer = trainer_of("experts4", mae=True, diffext=diffext)
        torch.manual_seed(seed)
        trainer.initialize()
        trainers.append(trainer)
        drawn.add(float(torch.rand(1)))
    assert len(drawn) == 2, "what is drawn afterwards is as random as before"
    weights = [t.network.encoder.state_dict() for t in trainers]
    for key in expert_tensors(weights[0]):
        old, own = before.network.encoder.state_dict()[key], weights[0][key]
        assert len(old) == there and torch.equal(own[:there], old)
        assert torch.equal(weights[0][key], weights[1][key])
        spread = (own[there:] - old.mean(0)).std() / old.std()
        assert 0.005 < spread < 0.02 and not torch.equal(own[-1], own[-2])


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ("", f"{PRETRAIN}_dim8_window3"),
        ("decoderOnly", f"{PRETRAIN}_plain_dim8_window3"),
        ("woMoE_depth1", f"{PRETRAIN}_plain_dim8_depth1_window3"),
        ("patch1_stages2", f"{PRETRAIN}_patch1_dim8_stages2_window3"),
    ],
)
def test_without_phase_1(tokens: str, wanted: str) -> None:
    """The command that makes it, and nothing has been built. What it makes fits."""
    trainer = trainer_of(tokens, mae=True)
    with pytest.raises(StageError) as caught:
        trainer.initialize()
    assert f"nnUNetv2_train Dataset999_Tiny 2d 0 -tr {wanted} -p nnUNetPlans" in str(caught.value)
    assert str(caught.value).endswith("Or leave phase 1 out: token noMAE.")
    assert trainer.network is None
    finish(ready_trainer(wanted.removeprefix(f"{PRETRAIN}_"), base=PRETRAIN, labels=LABELS, diffext=TWO))
    again = trainer_of(tokens, mae=True)
    again.initialize()
    assert again.settings.pretraining_trainer == wanted


def test_only_phases_1_are_offered_instead() -> None:
    options = {"labels": LABELS, "diffext": TWO}
    finish(ready_trainer(base="nnUNetTrainer", **options))
    assert "Or use" not in refused("No pretraining")
    finish(ready_trainer("dim12", base=PRETRAIN, **options))
    assert f"Or use a finished training, if it fits ({PRETRAIN}_dim12__nnUNetPlans__2d): export" in refused(
        "No pretraining"
    )


def test_phase_1_of_other_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("", monkeypatch, diffext=OTHERS)
    message = refused("knows the modalities CT, PET; this training is on CT, MR")
    assert "Repeat the pre-training on this dataset" in message and "token noMAE" in message
    swapped = {"modalities": dict(reversed(CASES.items())), "annotated": TWO["annotated"]}
    pretrain("", monkeypatch, diffext=swapped)
    refused("knows the modalities MR, CT; this training is on CT, MR")


@pytest.mark.parametrize("base", ["nnUNetTrainer", "DMEDSegTrainer"])
def test_training_of_another_method(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = ready_trainer(base=base, labels=LABELS, diffext=TWO)
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(finish(trained)))
    refused(f"was trained by {base}, which is no pre-training of M4oE. Use one of M4oEPretrainTrainer, .* token noMAE")


@pytest.mark.parametrize("tokens", ["dim12", "depth1", "patch1", "window4", "noStem"])
def test_networks_of_other_sizes(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(tokens, monkeypatch)
    refused("its encoder differs from this network's in .* tensors; the first is ")


def test_freezing_needs_a_model_with_a_new_modality(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("", monkeypatch)
    message = "has no modality that is newer than the others.*nnunet_diffext add_modality"
    refused(message, "freezeOld")
    ordinary = finish(ready())
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(ordinary))
    refused(message, "freezeOld")
    monkeypatch.delenv("nnUNet_diffext_pretraining")
    missing = refused("freezeOld trains the newest modality of a grown model", "freezeOld")
    assert "export nnUNet_diffext_pretraining=MODEL_FOLDER" in missing and "nnUNetv2_train" not in missing


# ------------------------------------------------------------------ continued
def test_continues_without_phase_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrain("", monkeypatch)
    trainer = ready(mae=True)
    trainer.train_step(batch_of(trainer))
    file = str(finish(trainer) / "fold_0" / FINAL)
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(tmp_path / "gone"))
    resumed = trainer_of(mae=True)
    resumed.load_checkpoint(file)
    weights = resumed.network.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in trainer.network.state_dict().items())
    assert resumed.settings.pretraining_trainer.startswith(PRETRAIN)
