"""Finding the prior: by name, by variable, in a checkpoint; and what is said when it is not there or does not fit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATASET, Kind, make_batch, make_plans, make_trainer
from tiny_prior import finish, save_prior

from nnunet_diffext.checkpoints import CheckpointError
from nnunet_diffext.stages import FINAL, StageError, find_model_folder, load_stage

FLAT = Kind((16, 16), ((1, 1), (2, 2)), features=(4, 8))
COMMAND = "nnUNetv2_train Dataset999_Tiny 2d 0 -tr nnUNetTrainer -p nnUNetPlans"


@pytest.fixture(autouse=True)
def empty_folders(nnunet_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders of one test, and no variable from outside."""
    monkeypatch.delenv("nnUNet_diffext_prior", raising=False)
    return nnunet_folders["nnUNet_results"]


def pgrd(tokens: str = "", kind: str | Kind = FLAT, **options: Any) -> Any:
    """A PGRD trainer, not initialised."""
    return make_trainer(tokens, kind, base="PGRDTrainer", **options)


def refused(message: str, error: type[Exception] = StageError, **options: Any) -> str:
    """The training is refused before a network is built."""
    trainer = pgrd(**options)
    with pytest.raises(error, match=message) as caught:
        trainer.initialize()
    assert trainer.network is None
    return str(caught.value)


def same_weights(a: Any, b: Any) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# ------------------------------------------------------------------ found
@pytest.mark.parametrize("kind", [FLAT, "2d-resenc", "3d-aniso"])
def test_weights_of_the_prior_are_in_the_network(kind: str | Kind) -> None:
    _, prior = save_prior(kind=kind)
    trainer = pgrd(kind=kind)
    torch.manual_seed(7)
    trainer.initialize()
    assert same_weights(trainer.network.prior, prior)
    assert trainer.plans_manager.plans["diffext"]["PGRDTrainer"]["prior_trainer"] == "nnUNetTrainer"
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in trainer.network.prior.parameters()}
    assert optimised == {id(p) for p in trainer.network.parameters() if p.requires_grad}


def test_prior_of_the_same_fold() -> None:
    networks = [save_prior(kind=FLAT, fold=fold, gain=1 + fold)[1] for fold in (0, 1)]
    trainer = pgrd(fold=1)
    trainer.initialize()
    assert same_weights(trainer.network.prior, networks[1]) and not same_weights(networks[0], networks[1])


def test_plans_made_for_pgrd_find_the_prior_of_the_plans_they_were_made_from() -> None:
    _, prior = save_prior(kind=FLAT)
    plans = make_plans(FLAT)
    plans.update(plans_name="nnUNetPGRDPlans", diffext={"planner": {"base_plans": "nnUNetPlans"}})
    plans["configurations"]["2d"]["batch_size"] = 6
    trainer = pgrd(plans=plans)
    trainer.initialize()
    assert same_weights(trainer.network.prior, prior)


@pytest.mark.parametrize("tokens", ["noPGR", "vanillaDDPM"])
def test_without_guidance_no_prior_is_looked_for(tokens: str) -> None:
    trainer = pgrd(tokens)
    trainer.initialize()
    assert trainer.network.prior is None and trainer.stage is None


# ------------------------------------------------------------------ not found
def test_missing_prior() -> None:
    text = refused(f"No prior for fold 0 in .*{DATASET}. Train it first:\n  {COMMAND}")
    assert "Or use" not in text


def test_unfinished_prior() -> None:
    model, _ = save_prior(kind=FLAT)
    (model / "fold_0" / FINAL).unlink()
    refused(f"The prior is not finished: .*fold_0 has no {FINAL}. Finish it first:\n  {COMMAND} --c")


def test_alternatives_are_listed_and_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prior = save_prior("3epochs", FLAT)
    other, _ = save_prior("seed1", FLAT, fold=1)
    text = refused("No prior for fold 0")
    assert other.name not in text, "it has another fold only"
    variable, value = text.rsplit("export ", 1)[1].split("=")
    assert variable == "nnUNet_diffext_prior" and model.name in text
    for given in (value.replace("NAME", model.name), str(model / "fold_0" / FINAL)):
        monkeypatch.setenv(variable, given)
        trainer = pgrd()
        trainer.initialize()
        assert same_weights(trainer.network.prior, prior)
        assert trainer.settings.prior_trainer == "nnUNetTrainer_3epochs"


def test_variable_that_names_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_diffext_prior", str(tmp_path))
    refused(f"nnUNet_diffext_prior={tmp_path} is no model folder: there is no .*plans.json")
    model, _ = save_prior(kind=FLAT)
    monkeypatch.setenv("nnUNet_diffext_prior", str(model))
    refused("Fold 3 of .* does not exist", fold=3)


@pytest.mark.parametrize("file", ["fold_0/checkpoint_best.pth", "fold_1/checkpoint_final.pth", "checkpoint_final.pth"])
def test_variable_that_names_another_checkpoint(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be ignored: the training builds on the final checkpoint of its own fold."""
    model, _ = save_prior(kind=FLAT)
    monkeypatch.setenv("nnUNet_diffext_prior", str(model / file))
    refused(f"{file} is not what would be used: .* fold_0/checkpoint_final.pth. Set the variable to the model folder")
    monkeypatch.setenv("nnUNet_diffext_prior", f"{model}/fold_0/{FINAL}")
    pgrd().initialize()


def test_results_folder_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(StageError, match="nnUNet_results is not set"):
        find_model_folder("prior", DATASET, "2d", "nnUNetTrainer", ["nnUNetPlans"], 0)


# ------------------------------------------------------------------ does not fit
MISFITS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "dataset": ("plans", lambda p: p.update(dataset_name="Dataset998_Other"), "trained on Dataset998_Other, this"),
    "configuration": ("plans", lambda p: p.update(configurations={"3d": {}}), r"no configuration 2d \(it has 3d\)"),
    "patch": ("plans", lambda p: p["configurations"]["2d"].update(patch_size=[8, 8]), r"\(patch_size is \[8, 8\] "),
    "spacing": ("plans", lambda p: p["configurations"]["2d"].update(spacing=[2.0, 1.0]), "other plans: spacing differ"),
    "preprocessor": ("plans", lambda p: p["configurations"]["2d"].update(preprocessor_name="X"), "processor_name is X"),
    "resampling": (
        "plans", lambda p: p["configurations"]["2d"].update(resampling_fn_data_kwargs={"order": 1}),
        "resampling_fn_data_kwargs differ",
    ),
    "intensities": (
        "plans", lambda p: p.update(foreground_intensity_properties_per_channel={"0": {"mean": 999.0}}),
        r"foreground_intensity_properties_per_channel is {'0': {'mean': 999.0}} ",
    ),
    "axes": ("plans", lambda p: p.update(transpose_forward=[2, 0, 1]), "transpose_forward"),
    "labels": ("dataset", lambda d: d["labels"].update(cyst=2), "other labels: .*cyst"),
    "channels": ("dataset", lambda d: d.update(channel_names={"0": "CT"}), "other channel_names: .*CT"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_prior_of_something_else(what: str) -> None:
    file, change, message = MISFITS[what]
    model, _ = save_prior(kind=FLAT)
    edit(model / f"{file}.json", change)
    refused(message)


def test_prior_of_another_batch_size_fits() -> None:
    model, _ = save_prior(kind=FLAT)
    edit(model / "plans.json", lambda p: p["configurations"]["2d"].update(batch_size=12))
    pgrd().initialize()


def test_prior_of_another_architecture() -> None:
    save_prior(kind=Kind(FLAT.patch, FLAT.strides, features=(8, 16)))
    message = r"do not fit the network that nnUNetTrainer builds from these plans: .*\(8, 1, 3, 3\) in the file, \(4, 1"
    with pytest.raises(StageError, match=message):
        pgrd().initialize()


def test_pgrd_is_not_its_own_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = save_prior("noPGR", FLAT, base="PGRDTrainer")
    monkeypatch.setenv("nnUNet_diffext_prior", str(model))
    refused("trained by PGRDTrainer itself, which cannot be its own prior")


# ------------------------------------------------------------------ damaged or hostile
class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    model, _ = save_prior(kind=FLAT)
    file = model / "fold_0" / FINAL
    content = torch.load(file, weights_only=False)

    torch.save({**content, "extra": Payload(tmp_path / "executed")}, file)
    refused("could run code", CheckpointError)
    assert not (tmp_path / "executed").exists()

    torch.save({"state_dict": {}}, file)
    refused("is no checkpoint of nnU-Net: it holds no network_weights", CheckpointError)

    file.write_bytes(b"PK\x03\x04 cut off")
    refused("is damaged or", CheckpointError)

    torch.save(content, file)
    (model / "plans.json").write_text("{")
    refused("plans.json cannot be read")


def test_stage_is_read_whole() -> None:
    model, network = save_prior("seed1", FLAT)
    stage = load_stage(model, 0)
    assert (stage.folder, stage.fold, stage.trainer_name) == (model, 0, "nnUNetTrainer_seed1")
    assert stage.weights.keys() == network.state_dict().keys()
    assert stage.plans["dataset_name"] == DATASET


# ------------------------------------------------------------------ continuing without the prior's folder
def test_checkpoint_brings_its_prior_along() -> None:
    """``--c`` and ``--val`` go on when the prior is gone or damaged; a new training in the same folder does not."""
    model, prior = save_prior(kind=FLAT)
    trainer = pgrd()
    trainer.initialize()
    trainer.network.train()
    trainer.train_step(make_batch(trainer, unlabeled=False))
    trainer._strength = 0.125
    checkpoint = str(finish(trainer) / "fold_0" / FINAL)

    for damage in (lambda: (model / "fold_0" / FINAL).write_bytes(b"cut off"), lambda: shutil.rmtree(model)):
        damage()
        resumed = pgrd()
        torch.manual_seed(9)
        resumed.load_checkpoint(checkpoint)
        assert resumed.stage is None and resumed._strength == 0.125
        assert same_weights(resumed.network, trainer.network) and same_weights(resumed.network.prior, prior)
        resumed.network.train()
        resumed.train_step(make_batch(resumed, unlabeled=False))
        assert same_weights(resumed.network.prior, prior)
    refused("No prior for fold 0")


@pytest.mark.parametrize("tokens", ["", "DEonly"])
def test_prior_of_our_own_methods(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings travel in the plans of the model folder, and win over others in the plans."""
    model, prior = save_prior(tokens, "2d", base="DMEDSegTrainer")
    monkeypatch.setenv("nnUNet_diffext_prior", str(model))
    plans = make_plans("2d")
    plans["diffext"] = {"DMEDSegTrainer": {"experts": "ce"}}
    trainer = pgrd(kind="2d", plans=plans)
    trainer.initialize()
    image = make_batch(trainer)["data"]
    with torch.no_grad():
        wanted = trainer.network.as_prior(prior(image))
        torch.testing.assert_close(trainer.network.eval().probabilities(image), wanted)
    own = finish(trainer)
    blocks = json.loads((own / "plans.json").read_text())["diffext"]
    assert blocks["DMEDSegTrainer"]["experts"] == ("de" if tokens else "both")

    shutil.rmtree(model)
    monkeypatch.delenv("nnUNet_diffext_prior")
    save_prior(kind="2d")  # what is found by name now is another prior than the checkpoint's
    resumed = pgrd(kind="2d")
    resumed.load_checkpoint(str(own / "fold_0" / FINAL))
    assert same_weights(resumed.network, trainer.network)
    assert resumed.settings.prior_trainer == trainer.settings.prior_trainer
    assert resumed.stage is None
