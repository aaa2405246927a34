"""A trained M4oE learns another modality: what ``add_modality`` writes, and what freezeOld leaves alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_dataset_json, make_plans
from tiny_m4oe import CASES, LABELS, TWO, batch_of, ready, snapshot
from tiny_prior import finish
from torch import Tensor, nn

from nnunet_diffext.cli.main import main
from nnunet_diffext.data.modalities import ModalityError
from nnunet_diffext.networks.blocks.experts import ModalityExperts
from nnunet_diffext.stages import StageError
from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.m4oe_growth import Growth, add_modality

MORE = "Dataset998_More"
NEW_CASES = {**CASES, "us_0": "US", "us_1": "US"}
NEW_LABELS = {**LABELS, "c": 3}
THREE = {"modalities": NEW_CASES, "annotated": {**TWO["annotated"], "US": ["a", "c"]}}


@pytest.fixture(autouse=True)
def alone(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """nnU-Net's folders of one test, and the dataset with the new modality."""
    monkeypatch.delenv("nnUNet_diffext_pretraining", raising=False)
    folder = nnunet_folders["nnUNet_preprocessed"] / MORE
    (folder / "nnUNetPlans_tiny").mkdir(parents=True)
    (folder / "nnUNetPlans_tiny" / "us_0.b2nd").touch()
    (folder / "nnUNetPlans.json").write_text(json.dumps(make_plans("2d")))
    write(NEW_LABELS, THREE)
    yield


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
    found = set()
    for name, module in network.named_modules():
        if isinstance(module, ModalityExperts):
            found |= {f"{name}.{key}" for key in module.stacked}
            found |= {f"{name}.gate.weight", f"{name}.gate.bias"} if module.tells else set()
    return found


# ------------------------------------------------------------------ training goes on
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


# ------------------------------------------------------------------ the command
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints can be pasted; the model that it extends is as it was."""
    folder, _ = trained()
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.suffix in (".json", ".pth")}
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copied"
    folder.rename(copy)
    assert main(["add_modality", "-m", str(copy), "-d", "998", "-o", "larger model"]) == 0
    printed = capsys.readouterr().out
    export, train = [shlex.split(line) for line in printed.splitlines()[-2:]]
    assert export == ["export", f"nnUNet_diffext_pretraining={tmp_path / 'larger model'}"]
    name = "M4oETrainer_dim8_window3_droppath0_freezeOld"
    assert train == ["nnUNetv2_train", "998", "2d", "0", "-tr", name, "-p", "nnUNetPlans"]
    assert "modality US added, labels c; 0.02 M parameters became 0.03 M." in printed
    assert {
        folder / f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.suffix in (".json", ".pth")
    } == before
    assert main(["add_modality", "-m", str(copy), "-d", "998", "-o", "larger model"]) == 1
    assert "exists" in capsys.readouterr().err


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("labels", "diffext", "message"),
    [
        (LABELS, TWO, "The model knows the modalities CT, MR; the dataset has CT, MR. One more is needed"),
        (NEW_LABELS, {**THREE, "modalities": dict(reversed(NEW_CASES.items()))}, "the dataset has US, MR, CT"),
        ({**NEW_LABELS, "a": 2, "b": 1}, THREE, "The model's labels are a, b; the dataset's are b, a, c"),
        (
            NEW_LABELS,
            {**THREE, "annotated": {"CT": ["a", "b"], "MR": ["b"], "US": ["c"]}},
            "other labels are annotated for CT than those that the model learned",
        ),
        (
            NEW_LABELS,
            {**THREE, "annotated": {"CT": ["a"], "MR": ["b", "c"], "US": ["a", "c"]}},
            "other labels are annotated for MR .* Only the new modality may bring labels",
        ),
    ],
)
def test_datasets_that_do_not_continue_the_model(
    labels: dict[str, Any], diffext: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = trained()
    write(labels, diffext)
    with pytest.raises(ModalityError, match=message):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_dataset_with_plans_of_its_own(tmp_path: Path, nnunet_folders: dict[str, Path]) -> None:
    """What ``nnUNetv2_plan_and_preprocess`` makes of it: reported before a model is written that nothing can train."""
    folder, _ = trained()
    file = nnunet_folders["nnUNet_preprocessed"] / MORE / "nnUNetPlans.json"
    file.write_text(json.dumps(make_plans("2d-shallow")))
    with pytest.raises(ModalityError, match="patch_size differ .*\n  nnUNetv2_move_plans_between_datasets -s .* -t "):
        grown(folder, tmp_path)
    file.unlink()
    with pytest.raises(ModalityError, match="there is no .*nnUNetPlans.json"):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_channel_that_is_normalised_in_another_way(tmp_path: Path, nnunet_folders: dict[str, Path]) -> None:
    """A model of CT alone, and CT with US: merged, their channel is no longer called CT."""
    folder, _ = trained()
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "channel_names": {"0": "CT"}}))
    with pytest.raises(ModalityError, match=r"for the channel 'CT' \(CTNormalization\), which does not suit"):
        grown(folder, tmp_path)
    assert not (tmp_path / "larger").exists()


def test_folds_go_on_from_those_of_the_model(
    tmp_path: Path, nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model was trained on must not validate it later."""
    folder, trainer = trained()
    splits = Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["ct_0", "mr_0"], "val": ["ct_1", "mr_1"]}]))
    more = nnunet_folders["nnUNet_preprocessed"] / MORE
    for case in NEW_CASES:
        (more / "nnUNetPlans_tiny" / f"{case}.b2nd").touch()
    assert main(["add_modality", "-m", str(folder), "-d", "998", "-o", str(tmp_path / "larger")]) == 0
    assert f"Wrote {more / 'splits_final.json'}: the folds of" in capsys.readouterr().out
    (fold,) = json.loads((more / "splits_final.json").read_text())
    assert {"ct_0", "mr_0"} < set(fold["train"]) and {"ct_1", "mr_1"} <= set(fold["val"])
    (more / "splits_final.json").write_text(json.dumps([{"train": ["ct_1", "us_0"], "val": ["ct_0", "us_1"]}]))
    assert main(["add_modality", "-m", str(folder), "-d", "998", "-o", str(tmp_path / "another")]) == 1
    assert "validates on 1 cases that the model was trained on, the first is ct_0" in capsys.readouterr().err
    assert not (tmp_path / "another").exists()


def test_models_of_other_methods(tmp_path: Path) -> None:
    folder = finish(ready(base="M4oEPretrainTrainer"))
    with pytest.raises(ValueError, match="is no model of M4oETrainer"):
        grown(folder, tmp_path)


def test_dataset_that_is_not_preprocessed(tmp_path: Path) -> None:
    folder, _ = trained()
    with pytest.raises(ValueError, match="997"):
        add_modality(folder, 997, tmp_path / "larger", [0])


def test_larger_model_on_other_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained()
    growth = grown(folder, tmp_path)
    monkeypatch.setenv("nnUNet_diffext_pretraining", str(growth.folder))
    plans = {**make_plans("2d-shallow"), "dataset_name": MORE}
    trainer = find_trainer(growth.trainer)(plans, "2d", 0, make_dataset_json(NEW_LABELS, 1, THREE), torch.device("cpu"))
    with pytest.raises(StageError, match="was trained with other plans: patch_size differ"):
        trainer.initialize()
