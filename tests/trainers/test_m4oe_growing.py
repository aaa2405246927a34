"""A trained M4oE learns another modality: what is trained, and what freezeOld leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_growth import MORE, NEW_CASES, NEW_LABELS, THREE, grown, predict, prepare, rows, trained, trainer_for, write
from tiny_m4oe import batch_of, snapshot
from tiny_prior import finish

from nnunet_diffext.trainers.m4oe_growth import add_modality


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's folders of one test, and the dataset with the new modality."""
    prepare(nnunet_folders, monkeypatch)


@pytest.mark.parametrize("tokens", ["", "swinUNet", "sampleGate_wd0p1", "noGN", "woMoE", "unionHead"])
def test_only_what_is_new_is_trained(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AdamW and SGD, with weight decay and momentum: whatever the old modalities use keeps every bit."""
    folder, old = trained(tokens)
    trainer = trainer_for(grown(folder, tmp_path), "freezeOld", monkeypatch)
    before, image = snapshot(trainer.network), torch.randn(2, 1, 16, 24)
    for step in range(4):
        trainer.train_step(batch_of(trainer, ("us_0", "us_1") if step % 2 else ("ct_0", "us_0"), seed=step))
    after, stacked = trainer.network.state_dict(), dict.fromkeys(rows(trainer.network), 2)
    if trainer.settings.shared_head:
        stacked |= {f"head.seg_layers.0.{key}": 3 for key in ("weight", "bias")}
    for name, was in before.items():
        if name in stacked:
            row = stacked[name]
            assert torch.equal(after[name][:row], was[:row]), name
            assert not torch.equal(after[name][row], was[row]), name
        else:
            assert torch.equal(after[name], was) == (not name.startswith("head.seg_layers.2.")), name
    for modality in (0, 1):
        was, now = (predict(net, modality, image) for net in (old.network, trainer.network))
        assert torch.equal(now[:, :3], was) and now[:, 3].max() < -16
    assert not torch.equal(predict(trainer.network, 2, image), predict(old.network, 0, image))


def test_without_the_token_everything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained()
    trainer = trainer_for(grown(folder, tmp_path), "", monkeypatch)
    assert trainer.network.active.tolist() == [True] * 3 and trainer.network.since.tolist() == [0, 0, 1]
    before = snapshot(trainer.network)
    trainer.train_step(batch_of(trainer, ("ct_0", "mr_0", "us_0")))
    parameters = dict(trainer.network.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        ("", "M4oETrainer_dim8_window3_droppath0"),
        ("experts4", "M4oETrainer_dim8_window3_droppath0_experts5"),
        ("3epochs_experts2", "M4oETrainer_dim8_window3_droppath0_3epochs"),
    ],
)
def test_the_name_to_train_on_with(tokens: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts from the larger model, whatever the old name said about experts and pre-training."""
    folder, old = trained(tokens)
    assert "noMAE" in folder.name
    growth = grown(folder, tmp_path)
    assert growth.trainer == name and growth.plans == "nnUNetPlans" and growth.configuration == "2d"
    trainer = trainer_for(growth, "", monkeypatch)
    assert trainer.module.experts == old.module.experts + 1
    assert torch.equal(trainer.network.head.seg_layers[0].weight, old.network.head.seg_layers[0].weight)
    assert growth.parameters == tuple(sum(p.numel() for p in t.network.parameters()) for t in (old, trainer))


@pytest.mark.parametrize(
    ("token", "cases", "active"),
    [
        ("", ["ct_0", "us_0"], [True, False, True]),
        ("", ["ct_0", "mr_0", "us_0"], [True, True, True]),
        ("freezeOld", ["ct_0", "mr_0", "us_0"], [True, False, True]),
        ("freezeOld", ["ct_0", "mr_0"], [True, False, False]),
    ],
)
def test_modality_that_was_never_taught_stays_off(
    token: str, cases: list[str], active: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless this training teaches it: MR had no training case in the model that has been grown."""
    folder, _ = trained()
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    checkpoint["network_weights"]["active"][1] = False
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    trainer = trainer_for(grown(folder, tmp_path), token, monkeypatch)
    monkeypatch.setattr(nnUNetTrainer, "on_train_start", lambda self: None)
    splits = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    splits.write_text(json.dumps([{"train": cases, "val": ["ct_1"]}]))
    trainer.on_train_start()
    assert trainer.module.active.tolist() == active


@pytest.mark.parametrize(("tokens", "experts"), [("", "_experts4"), ("woMoE", ""), ("noGN", "")])
def test_from_a_single_modality(tokens: str, experts: str, tmp_path: Path) -> None:
    """Which has three experts, if there is a gate: now there are four."""
    labels = {"background": 0, "a": 1}
    folder, _ = trained(tokens, labels=labels, diffext=None)
    write({**labels, "c": 2}, {"modalities": {"ct": "MR0", "us_0": "US"}, "annotated": {"MR0": ["a"], "US": ["c"]}})
    growth = grown(folder, tmp_path)
    assert growth.trainer == "_".join(filter(None, ["M4oETrainer_dim8_window3_droppath0", tokens])) + experts
    assert growth.modality == "US" and growth.labels == ("c",)


def test_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger model, trained, becomes a larger one again; its name does not say freezeOld twice."""
    folder, old = trained()
    trainer = trainer_for(grown(folder, tmp_path), "freezeOld", monkeypatch)
    trainer.train_step(batch_of(trainer, ("us_0", "us_1")))
    labels, cases = {**NEW_LABELS, "d": 4}, {**NEW_CASES, "pet_0": "PET"}
    write(labels, {"modalities": cases, "annotated": {**THREE["annotated"], "PET": ["d"]}})
    growth = add_modality(finish(trainer), MORE, tmp_path / "again", [0])
    assert growth.modality == "PET" and growth.labels == ("d",) and "freezeOld" not in growth.trainer
    weights = torch.load(growth.folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert weights["since"].tolist() == [0, 0, 1, 2] and weights["active"].tolist() == [True] * 3 + [False]
