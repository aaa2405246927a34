"""``nnunet_diffext plan``: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned_dataset import NAME, NUMBER, SHAPE, TRAINING_CASES, Planned

from nnunet_diffext.cli.main import main
from nnunet_diffext.planners import PLANNERS, find_planner
from nnunet_diffext.planners.base import DiffextPlanner
from nnunet_diffext.planners.base import Planned as PlannedSizes
from nnunet_diffext.planners.dmed import DMEDPlanner
from nnunet_diffext.planners.dry_run import estimate
from nnunet_diffext.planners.memory import GIB, StepMemory
from nnunet_diffext.planners.plans_file import in_order, with_spacing
from nnunet_diffext.planners.topology import topologies
from nnunet_diffext.trainers import find_trainer

QUICK = "DMEDSegTrainer_CEonly"
"""One expert: everything but the size of the step is the same, and an estimate takes a fifth of the time."""
PLANS = "nnUNetDMEDPlans"


def plan(*arguments: str, trainer: str = QUICK) -> int:
    return main(["plan", "-d", str(NUMBER), "-pl", "DMEDPlanner", "-device", "cpu", "-tr", trainer, *arguments])


SHARED: dict[str, StepMemory] = {}


def quick_plan(target: float, *configurations: str, **options: Any) -> dict[str, PlannedSizes]:
    """The planner itself, on nnUNetPlans; what one test has estimated, the others do not estimate again."""
    planner = DMEDPlanner(NUMBER, target, configurations=configurations, trainer_name=QUICK, **options)
    planner.estimates = SHARED
    planner.plan_experiment()
    return planner.results


@pytest.fixture(scope="module")
def needs(prepared: Path) -> tuple[float, float]:
    """GB that the smallest patch and the base plans' sizes need, in ``3d_fullres``."""
    folder = prepared / "nnUNet_preprocessed" / NAME
    plans, dataset_json = (json.loads((folder / f"{n}.json").read_text()) for n in ("nnUNetPlans", "dataset"))
    base = plans["configurations"]["3d_fullres"]
    smallest = list(topologies(base["spacing"], base["median_image_size_in_voxels"]))[-1]
    small = {"patch_size": smallest.patch_size, "architecture": smallest.architecture(base["architecture"])}
    trials = [{**plans, "configurations": {"3d_fullres": {**base, **changes}}} for changes in (small, {})]
    low, high = (estimate(find_trainer(QUICK), trial, "3d_fullres", dataset_json).total / GIB for trial in trials)
    return low, high


def sizes(planned: Planned, name: str = "3d_fullres", plans_name: str = PLANS) -> tuple[list[int], int]:
    configuration = PlansManager(planned.read(plans_name)).get_configuration(name)
    return configuration.patch_size, configuration.batch_size


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


# ------------------------------------------------------------------ what is planned
def test_a_plan_for_two_experts(planned: Planned) -> None:
    planner = DMEDPlanner(NUMBER, 2, configurations=["3d_fullres"])
    planner.plan_experiment()
    result = planner.results["3d_fullres"]
    assert (result.patch_size, result.batch_size) == (SHAPE, 2) == (result.base_patch_size, result.base_batch_size)
    assert result.memory == result.base_memory and 1 < result.memory.total / GIB <= 2
    assert planned.read(PLANS)["diffext"]["planner"]["trainer"] == "DMEDSegTrainer"
    assert sizes(planned) == (list(SHAPE), 2)


def test_a_smaller_patch_on_the_same_data(
    planned: Planned, needs: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(planned.folder)
    target = f"{sum(needs) / 2:.2f}"
    assert plan("-gpu_memory_target", target, "-c", "3d_fullres") == 0
    after = contents(planned.folder)
    assert {name: after[name] for name in before} == before, "nothing that was there is changed"
    assert set(after) - set(before) == {f"{PLANS}.json"}

    base, new = planned.read("nnUNetPlans"), planned.read(PLANS)
    old, configuration = (p["configurations"]["3d_fullres"] for p in (base, new))
    changed = {key for key in old if configuration[key] != old[key]}
    assert changed <= {"patch_size", "batch_size", "architecture"} and "patch_size" in changed
    assert prod(configuration["patch_size"]) < prod(old["patch_size"])
    assert new["plans_name"] == PLANS and new["experiment_planner_used"] == "DMEDPlanner"
    provenance = new["diffext"]["planner"]
    assert provenance["needed_gb"]["3d_fullres"] <= float(target) == provenance["gpu_memory_target_gb"]
    assert provenance["trainer"] == QUICK and provenance["base_plans"] == "nnUNetPlans"
    assert not list(planned.folder.glob(".*")), "no temporary file is left"
    printed = capsys.readouterr().out
    assert "would need" in printed and "nnUNetv2_preprocess -d 961 -plans_name nnUNetDMEDPlans -c 3d_fullres" in printed


def test_sizes_grow_with_the_target(planned: Planned, needs: tuple[float, float]) -> None:
    low, high = needs
    found = []
    for target in (1.001 * low, (low + high) / 2, 1.001 * high, 2 * high):
        result = quick_plan(target, "3d_fullres")["3d_fullres"]
        assert result.memory.total <= target * GIB
        assert sizes(planned) == (list(result.patch_size), result.batch_size)
        found.append((prod(result.patch_size), result.batch_size))
    patches, batches = zip(*found, strict=True)
    assert list(patches) == sorted(patches) and patches[0] < patches[-1] == prod(SHAPE)
    # nnU-Net's rule: a batch covers at most 5 % of all voxels
    assert batches[0] == 2 and batches[-1] == round(0.05 * TRAINING_CASES)


def test_a_larger_batch_if_the_whole_image_fits(planned: Planned, needs: tuple[float, float]) -> None:
    target = 2 * needs[1]
    planned.write("dataset", {**planned.read("dataset"), "numTraining": 2000})
    result = quick_plan(target, "3d_fullres")["3d_fullres"]
    assert result.patch_size == SHAPE and 2 < result.batch_size < 100
    assert 0.93 * target < result.memory.total / GIB <= target, "the memory is used"


def test_residual_encoders_in_2d(planned: Planned) -> None:
    arguments = ["-p", "nnUNetResEncUNetMPlans", "-overwrite_plans_name", "Mine", "-c", "2d"]
    planned.write("dataset", {**planned.read("dataset"), "numTraining": 1})  # nnU-Net's rule leaves two samples
    assert plan(*arguments, "-gpu_memory_target", "1.5") == 0
    base, new = planned.read("nnUNetResEncUNetMPlans"), planned.read("Mine")
    assert list(new["configurations"]) == ["2d"]
    assert new["configurations"]["2d"] == {**base["configurations"]["2d"], "batch_size": 2}
    assert not (planned.folder / f"{PLANS}.json").exists()


def test_the_standard_configurations_are_planned(planned: Planned) -> None:
    base = planned.read("nnUNetPlans")
    base["configurations"]["mine"] = {"inherits_from": "2d", "batch_size": 3}
    assert in_order(base, None) == ["2d", "3d_fullres"]
    assert in_order(base, ["mine"]) == ["2d", "mine"]


@pytest.mark.parametrize("enough", [True, False])
def test_the_cascade_follows_full_resolution(planned: Planned, needs: tuple[float, float], enough: bool) -> None:
    planned.add_cascade()
    target = 2 * needs[1] if enough else sum(needs) / 2
    results = quick_plan(target, "3d_cascade_fullres")
    new = planned.read(PLANS)
    assert list(new["configurations"]) == ["3d_fullres", "3d_lowres", "3d_cascade_fullres"], "what it depends on"
    assert new["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    cascade = new["configurations"]["3d_cascade_fullres"]
    assert (cascade["inherits_from"], cascade["previous_stage"]) == ("3d_fullres", "3d_lowres")
    assert all(result.memory.total <= target * GIB for result in results.values())
    if enough:
        assert "patch_size" not in cascade and sizes(planned, "3d_cascade_fullres") == sizes(planned)


def test_a_stage_without_its_successor(planned: Planned) -> None:
    planned.add_cascade()
    quick_plan(2, "3d_lowres")
    assert "next_stage" not in planned.read(PLANS)["configurations"]["3d_lowres"]


# ------------------------------------------------------------------ other spacing, settings, older plans
def test_another_spacing_needs_other_data(planned: Planned) -> None:
    assert plan("-gpu_memory_target", "1.5", "-overwrite_target_spacing", "1.5", "1", "1", "-c", "3d_fullres") == 0
    (name, configuration), *none = planned.read(PLANS)["configurations"].items()
    assert (name, none) == ("3d_fullres", []) and configuration["data_identifier"] == f"{PLANS}_3d_fullres"
    assert configuration["spacing"] == [1.5, 1.0, 1.0]
    assert configuration["median_image_size_in_voxels"] == [16.0, 32.0, 32.0]
    assert planned.read("nnUNetPlans")["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]


def test_data_of_the_same_spacing_and_normalisation_are_reused(planned: Planned) -> None:
    base = planned.read("nnUNetResEncUNetMPlans")
    base["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    new = with_spacing(base, NAME, [1.0, 1.0, 1.0], "New")["configurations"]
    assert new["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert new["2d"]["data_identifier"] == "New_2d"


def test_older_plans_are_replaced_as_nnunet_does(
    planned: Planned, needs: tuple[float, float], capsys: pytest.CaptureFixture[str]
) -> None:
    quick_plan(2, "3d_fullres")
    older = planned.read(PLANS)
    older["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    older["diffext"]["DMEDSegTrainer"] = {"epochs": 5}
    planned.write(PLANS, older)
    capsys.readouterr()
    quick_plan(sum(needs) / 2, "3d_fullres")
    printed = capsys.readouterr().out
    assert "replaced" in printed and "Kept from the older plans: mine" in printed
    assert prod(sizes(planned)[0]) < prod(older["configurations"]["3d_fullres"]["patch_size"])
    assert sizes(planned, "mine") == (sizes(planned)[0], 7)
    assert planned.read(PLANS)["diffext"]["DMEDSegTrainer"] == {"epochs": 5}


def test_settings_in_the_base_plans_count(planned: Planned) -> None:
    base = planned.read("nnUNetPlans")
    base["diffext"] = {"DMEDSegTrainer": {"experts": "ce"}}
    planned.write("nnUNetPlans", base)
    planners = [
        DMEDPlanner(NUMBER, 2, configurations=["3d_fullres"], trainer_name=name, plans_name=f"Plans{i}")
        for i, name in enumerate(["DMEDSegTrainer", QUICK])
    ]
    for planner in planners:
        planner.plan_experiment()
    assert planners[0].results == planners[1].results


# ------------------------------------------------------------------ used by nnU-Net
@pytest.mark.parametrize("trainer_class", [nnUNetTrainer, find_trainer(QUICK)])
def test_trainers_start_with_the_plans(planned: Planned, trainer_class: type[nnUNetTrainer]) -> None:
    quick_plan(2, "3d_fullres")
    data = planned.folder / "nnUNetPlans_3d_fullres"
    data.mkdir()
    (data / "case_000.b2nd").touch()  # what the loader's file format is recognised by
    plans = {**planned.read(PLANS), "continue_training": False}
    trainer = trainer_class(plans, "3d_fullres", 0, planned.read("dataset"), torch.device("cpu"))
    trainer.initialize()
    patch = torch.zeros(1, 1, *trainer.configuration_manager.patch_size)
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert trainer.network(patch).shape == (1, 2, *patch.shape[2:])


# ------------------------------------------------------------------ what is refused
def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> str:
    assert plan(*arguments, **options) == 1
    return capsys.readouterr().err


def test_too_little_memory(planned: Planned, needs: tuple[float, float], capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "-gpu_memory_target", "0.5", "-c", "3d_fullres")
    assert "does not fit into 0.5 GB" in message
    assert "12 x 16 x 16" in message and f"needs {needs[0]:.2f} GB (estimated)" in message
    assert not (planned.folder / f"{PLANS}.json").exists()


def test_no_base_plans(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in (
        ("nnUNetPlans", f"nnUNetv2_plan_and_preprocess -d {NUMBER}."),
        ("nnUNetResEncUNetMPlans", f"nnUNetv2_plan_and_preprocess -d {NUMBER} -pl nnUNetPlannerResEncM."),
    ):
        (planned.folder / f"{name}.json").unlink()
        assert command.rstrip(".") in refusal(capsys, "-p", name)
    (planned.folder / "dataset_fingerprint.json").unlink()
    (planned.folder / "dataset.json").unlink()
    planned.folder.rmdir()
    assert f"nnUNetv2_plan_and_preprocess -d {NUMBER}" in refusal(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-overwrite_plans_name", "nnUNetPlans"], "would overwrite the base plans"),
        (["-overwrite_plans_name", "my__plans"], "splits the names"),
        (["-overwrite_plans_name", "nnUNetResEncUNetMPlans"], "was made by nnUNetPlannerResEncM"),
        (["-c", "3d_lowres"], "have no configuration 3d_lowres; they have 2d, 3d_fullres"),
        (["-gpu_memory_target", "-1"], "must be positive"),
        (["-overwrite_target_spacing", "1", "1"], "three positive numbers"),
        (["-tr", "nnUNetTrainer"], "plans for DMEDSegTrainer"),
        (["-tr", "NoSuchTrainer"], "NoSuchTrainer"),
        (["-d", "777"], "777"),
    ],
)
def test_wrong_calls(planned: Planned, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    before = contents(planned.folder)
    assert message in refusal(capsys, *arguments)
    assert contents(planned.folder) == before


def test_plans_of_other_networks_are_refused(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    base = planned.read("nnUNetPlans")
    del base["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kernel_sizes"]
    planned.write("nnUNetPlans", base)
    assert "without kernel_sizes" in refusal(capsys, "-c", "3d_fullres")


def test_planners_are_found_by_name() -> None:
    for name in PLANNERS:
        planner = find_planner(name)
        assert issubclass(planner, DiffextPlanner) and planner.__name__ == name
        assert find_trainer(planner.trainer) and "__" not in planner.default_plans_name
    with pytest.raises(ValueError, match="nnUNetv2_plan_experiment"):
        find_planner("ExperimentPlanner")


def test_gpus_are_only_used_if_there_is_one(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    arguments = ["plan", "-d", NAME, "-pl", "DMEDPlanner", "-device", "cuda"]
    assert main(arguments) == 1
    assert "finds no GPU" in capsys.readouterr().err
