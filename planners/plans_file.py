"""Plans files: those that planning starts from, and the one that it writes. nnU-Net's own files are never changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.data.dataset import dataset_id, load_json
from nnunet_diffext.files import write_atomically
from nnunet_diffext.stages import DATA_KEYS, PLAN_DATA_KEYS

STANDARD = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
PLANNER_OF = {f"nnUNetResEncUNet{size}Plans": f"nnUNetPlannerResEnc{size}" for size in ("M", "L", "XL")}


def check_name(plans_name: str, base_plans: str) -> None:
    """Raise ``ValueError`` for a name that nnU-Net cannot use, or that would overwrite the base plans."""
    if "__" in plans_name:
        raise ValueError(
            f"'{plans_name}' cannot name plans: nnU-Net splits the names of result folders at '__'. "
            "Choose another -overwrite_plans_name."
        )
    if plans_name == base_plans:
        raise ValueError(
            f"The new plans would overwrite the base plans {base_plans}. Choose another -overwrite_plans_name."
        )


def load_base(folder: Path, dataset: str, name: str) -> dict[str, Any]:
    """The plans that planning starts from.

    Raises:
        FileNotFoundError: they do not exist; the message has the command that makes them.
    """
    planner = f" -pl {PLANNER_OF[name]}" if name in PLANNER_OF else ""
    others = sorted(f.stem for f in folder.glob("*Plans*.json"))
    known = f" Plans of this dataset: {', '.join(others)} (choose with -p)." if others else ""
    command = f"nnUNetv2_plan_and_preprocess -d {dataset_id(dataset)}{planner}"
    return load_json(folder / f"{name}.json", f"Let nnU-Net plan the dataset first: {command}{known and '.' + known}")


def load_replaceable(file: Path, planner: str) -> dict[str, Any]:
    """The plans that are about to be replaced; empty if there are none.

    Raises:
        ValueError: another planner made them.
    """
    if not file.exists():
        return {}
    old = load_json(file, "")
    if old.get("experiment_planner_used") != planner:
        raise ValueError(
            f"{file} was made by {old.get('experiment_planner_used')}, not by {planner}, and stays as it is. "
            "Choose another -overwrite_plans_name."
        )
    return old


def save(plans: dict[str, Any], file: Path, old: Mapping[str, Any]) -> None:
    """Write the plans. As in nnU-Net, older ones are replaced, but for configurations that were not planned."""
    configurations = plans["configurations"]
    kept = [c for c in old.get("configurations", {}) if c not in configurations]
    configurations.update({c: old["configurations"][c] for c in kept})
    for configuration in configurations.values():
        _drop_missing_stages(configuration, configurations)
    recursive_fix_for_json_export(plans)
    write_atomically(file, json.dumps(plans, indent=4))
    print(f"Plans were saved to {file}" + (" (older ones of the same name were replaced)." if old else "."))
    if kept:
        print(f"Kept from the older plans: {', '.join(kept)}.")


def in_order(base: Mapping[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """Configurations to plan, each after those that it inherits from or continues.

    Args:
        base: plans.
        wanted: names; default: nnU-Net's standard ones.

    Raises:
        ValueError: the plans have no such configuration.
    """
    available = base["configurations"]
    wanted = [c for c in STANDARD if c in available] if wanted is None else list(wanted)
    unknown = [c for c in wanted if c not in available]
    if unknown or not wanted:
        raise ValueError(
            f"The plans {base['plans_name']} have no configuration {', '.join(unknown or STANDARD)}; they have "
            f"{', '.join(available)}. Choose with -c."
        )
    order: list[str] = []

    def add(name: str) -> None:
        for key in ("inherits_from", "previous_stage"):
            if key in available[name]:
                add(available[name][key])
        if name not in order:
            order.append(name)

    for name in wanted:
        add(name)
    return order


def with_spacing(base: Mapping[str, Any], dataset: str, spacing: Sequence[float], plans_name: str) -> dict[str, Any]:
    """What nnU-Net's own planner, the one of the base plans, plans for another target spacing. Nothing is saved.

    Configurations whose data differ from the base's get a ``data_identifier`` of their own.

    Raises:
        ValueError: the spacing is no three positive numbers, or the base plans come from no planner of nnU-Net.
    """
    if len(spacing) != 3 or not all(s > 0 for s in spacing):
        raise ValueError(f"The target spacing must be three positive numbers (mm), not {list(spacing)}.")
    planner_class = PlansManager(dict(base)).experiment_planner_class
    if planner_class is None:
        raise ValueError(
            f"The base plans were made by {base['experiment_planner_used']}, which is no planner of nnU-Net; another "
            "target spacing needs plans such as nnUNetPlans (-p)."
        )
    planner = type(planner_class.__name__, (_InMemory, planner_class), {})(
        dataset, plans_name=plans_name, overwrite_target_spacing=[float(s) for s in spacing]
    )
    plans = json.loads(json.dumps(planner.plan_experiment()))
    for name, configuration in plans["configurations"].items():
        if "data_identifier" in configuration:
            old = base["configurations"].get(name, {})
            same = all(configuration[k] == old.get(k) for k in DATA_KEYS) and all(
                plans[k] == base.get(k) for k in PLAN_DATA_KEYS
            )
            configuration["data_identifier"] = old["data_identifier"] if same else f"{plans_name}_{name}"
    return plans


class _InMemory(ExperimentPlanner):
    """Keeps the plans instead of writing them to a file."""

    def save_plans(self, plans: dict[str, Any]) -> None:
        recursive_fix_for_json_export(plans)


def _drop_missing_stages(configuration: dict[str, Any], available: Mapping[str, Any]) -> None:
    stages = configuration.get("next_stage")
    if stages is None:
        return
    present = [s for s in ([stages] if isinstance(stages, str) else stages) if s in available]
    if not present:
        del configuration["next_stage"]
    else:
        configuration["next_stage"] = stages if isinstance(stages, str) else present
