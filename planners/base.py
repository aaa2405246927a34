"""Base of the planners: patch and batch size for a method's training step within a memory target, on preprocessed data.

A planner starts from plans that nnU-Net made, keeps everything that the preprocessed data depend on, and searches patch
and batch anew. What a step needs is taken from the method's real trainer (:mod:`nnunet_diffext.planners.dry_run`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.data.dataset import dataset_id, dataset_name, load_json, preprocessed_folder
from nnunet_diffext.planners import plans_file
from nnunet_diffext.planners.dry_run import estimate, measure
from nnunet_diffext.planners.memory import GIB, StepMemory, can_measure
from nnunet_diffext.planners.search import MIN_BATCH, Known, Sizes, largest_sizes
from nnunet_diffext.planners.topology import Topology, require_unet, topologies
from nnunet_diffext.settings import PLANNER_KEY, PLANS_KEY
from nnunet_diffext.trainers import find_trainer

MAX_SHARE = 0.05
"""nnU-Net's rule: a batch of more than MIN_BATCH samples covers at most this share of the training cases' voxels."""
FEW, MANY = 8, 16
"""Memory grows linearly with the batch. Above MANY it is extrapolated from these two: here and there, trainers handle
samples one by one, and without data every operation takes the same time."""
SIZE_KEYS = ("patch_size", "batch_size", "architecture")


@dataclass(frozen=True)
class Planned:
    """What was planned for one configuration.

    Attributes:
        patch_size, batch_size: as in the plans.
        memory: what the method's training step needs.
        base_patch_size, base_batch_size: those of the base plans.
        base_memory: what the step would need with these.
        data_identifier: folder of the preprocessed data.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    memory: StepMemory
    base_patch_size: tuple[int, ...]
    base_batch_size: int
    base_memory: StepMemory
    data_identifier: str

    def __str__(self) -> str:
        parts = {"parameters, optimiser, teacher, CUDA context": self.memory.fixed, "activations": self.memory.variable}
        if self.memory.workspace:
            parts["cuDNN and allocator"] = self.memory.workspace
        return (
            f"  patch {times(self.patch_size)}, batch {self.batch_size}: {self.memory} = "
            + " + ".join(f"{value / GIB:.2f} {what}" for what, value in parts.items())
            + f"\n  The base plans' patch {times(self.base_patch_size)}, batch {self.base_batch_size}, would need "
            f"{self.base_memory}.\n  Data: {self.data_identifier}"
        )


class DiffextPlanner:
    """Plans for one dataset. A method names its trainer and the name of its plans.

    Args:
        dataset_name_or_id: dataset; nnU-Net must have planned it.
        gpu_memory_target_in_gb: what a training may need, CUDA context included, in GB of 2^30 bytes.
        base_plans: name of the plans to start from.
        plans_name: of the new plans; default: :attr:`default_plans_name`.
        overwrite_target_spacing: of ``3d_fullres`` in mm, as in nnU-Net; other configurations follow from it, and the
            data must be preprocessed again.
        configurations: to plan; those they depend on are added. Default: nnU-Net's standard ones in the base plans.
        trainer_name: plan for this variant of :attr:`trainer`.
        device: a GPU to measure on; on any other device, the need is estimated.

    Raises:
        ValueError: unknown dataset, configuration or trainer, or a name that nnU-Net cannot use.
        FileNotFoundError: the base plans do not exist; the message has the command that makes them.
    """

    trainer: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    """Further trainers that it can plan for, with ``trainer_name``."""
    default_plans_name: ClassVar[str]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        *,
        base_plans: str = "nnUNetPlans",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        configurations: Sequence[str] | None = None,
        trainer_name: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not gpu_memory_target_in_gb > 0:
            raise ValueError(f"-gpu_memory_target must be positive (GB), not {gpu_memory_target_in_gb}.")
        self.dataset = dataset_name(dataset_name_or_id)
        self.target_gb = float(gpu_memory_target_in_gb)
        self.trainer_class = self._find_trainer(trainer_name or self.trainer)
        self.base_plans = base_plans
        self.plans_name = plans_name or self.default_plans_name
        plans_file.check_name(self.plans_name, base_plans)
        self.folder = preprocessed_folder(self.dataset)
        self.base = plans_file.load_base(self.folder, self.dataset, base_plans)
        if overwrite_target_spacing is not None:
            self.base = plans_file.with_spacing(self.base, self.dataset, overwrite_target_spacing, self.plans_name)
        self.configurations = plans_file.in_order(self.base, configurations)
        self.dataset_json = load_json(
            self.folder / "dataset.json", f"Plan again: nnUNetv2_plan_experiment -d {dataset_id(self.dataset)}"
        )
        self.measures = device is not None and can_measure(device, self.target)
        self.device = device or torch.device("cpu")
        self.results: dict[str, Planned] = {}
        self.estimates: dict[str, StepMemory] = {}
        """What was estimated so far. Planners that differ in target and name only may share it."""

    @property
    def target(self) -> float:
        """The memory target in bytes."""
        return self.target_gb * GIB

    def plan_experiment(self) -> Path:
        """Plan all configurations, save the plans and say what was planned; returns the file.

        Raises:
            ValueError: not even the smallest patch fits (with numbers), or the file holds the plans of another planner.
        """
        file = self.folder / f"{self.plans_name}.json"
        old = plans_file.load_replaceable(file, type(self).__name__)
        # what a user wrote into the block stays, in the base plans and in the older plans alike
        blocks = self._of_the_user({**deepcopy(self.base.get(PLANS_KEY, {})), **old.get(PLANS_KEY, {})})
        plans = {**deepcopy(self.base), "configurations": {}, PLANS_KEY: blocks}
        plans.update(plans_name=self.plans_name, experiment_planner_used=type(self).__name__)
        how = f"measured on {torch.cuda.get_device_name(self.device)}" if self.measures else "estimated"
        print(
            f"{type(self).__name__}: {self.dataset} for {self.trainer_class.__name__} within {self.target_gb:g} GB, "
            f"from {self.base_plans}; memory is {how}."
        )
        if self.device.type == "cuda" and not self.measures:
            print(f"  Less than {self.target_gb:g} GB are free on {self.device}, so nothing is measured.")
        for name in self.configurations:
            self.results[name] = self._plan(plans, name)
            print(f"{name}:\n{self.results[name]}")
        blocks[PLANNER_KEY] = self._provenance(how, blocks)
        plans_file.save(plans, file, old)
        self._say_what_to_do()
        return file

    def _of_the_user(self, blocks: dict[str, Any]) -> dict[str, Any]:
        """The settings that planning starts from: without what an earlier planning has changed in them."""
        return blocks

    def _plan(self, plans: dict[str, Any], name: str) -> Planned:
        """Add one configuration to the plans. What inherits its sizes keeps doing so, if they fit."""
        own = deepcopy(self.base["configurations"][name])
        base = PlansManager(self.base).get_configuration(name).configuration
        require_unet(base["architecture"])
        base_memory = self._estimate(single_configuration(plans, name, base), name)
        plans["configurations"][name] = own
        memory = None
        if "inherits_from" in own and not any(key in own for key in SIZE_KEYS):
            memory = self._needed(plans, name)
        if memory is None or memory.total > self.target:
            topology, own["batch_size"], memory = self._search(plans, name, base, base_memory)
            own["patch_size"] = list(topology.patch_size)
            own["architecture"] = topology.architecture(base["architecture"])
        new = PlansManager(plans).get_configuration(name)
        return Planned(
            tuple(new.patch_size), new.batch_size, memory,
            tuple(base["patch_size"]), base["batch_size"], base_memory, new.data_identifier,
        )  # fmt: skip

    def _search(self, plans: dict[str, Any], name: str, base: dict[str, Any], base_memory: StepMemory) -> Sizes:
        candidates = self.candidates(base)

        def needed(topology: Topology, batch_size: int) -> StepMemory:
            architecture = topology.architecture(base["architecture"])
            sizes = {"patch_size": list(topology.patch_size), "batch_size": batch_size, "architecture": architecture}
            return self._needed(single_configuration(plans, name, {**base, **sizes}), name)

        known = Known(base_memory, prod(base["patch_size"]) * base["batch_size"])
        sizes = largest_sizes(candidates, needed, self.target, lambda t: self.max_batch(name, t.voxels), known)
        if sizes is None:
            smallest = candidates[-1]
            raise ValueError(
                f"{self.dataset}, {name}: {self.trainer_class.__name__} does not fit into {self.target_gb:g} GB. Its "
                f"smallest patch, {times(smallest.patch_size)} with batch {MIN_BATCH}, needs "
                f"{needed(smallest, MIN_BATCH)}. Use a GPU with more memory and -gpu_memory_target, leave the "
                "configuration out (-c), or plan for a smaller variant (-tr)."
            )
        return sizes

    def candidates(self, base: Mapping[str, Any]) -> list[Topology]:
        """Patches to try for a complete configuration of the base plans, from the largest to the smallest."""
        return list(topologies(base["spacing"], base["median_image_size_in_voxels"]))

    def max_batch(self, name: str, voxels: int) -> int:
        """nnU-Net's limit for the batch of a patch of so many voxels."""
        return max(MIN_BATCH, round(MAX_SHARE * self._training_voxels(name) / voxels))

    def _training_voxels(self, name: str) -> float:
        """Voxels of all training cases, at the target spacing."""
        manager = PlansManager(self.base)
        shape = list(manager.get_configuration(name).median_image_size_in_voxels)
        if len(shape) == 2:  # as many slices as in 3d_fullres, if there is one
            if "3d_fullres" in manager.available_configurations:
                shape = manager.get_configuration("3d_fullres").median_image_size_in_voxels
            else:
                shape = [manager.original_median_shape_after_transp[0], *shape]
        return float(prod(shape)) * self.dataset_json["numTraining"]

    def _needed(self, plans: Mapping[str, Any], name: str) -> StepMemory:
        if self.measures:
            measured = measure(self.trainer_class, plans, name, self.dataset_json, self.device)
            if measured is not None:
                return measured
        estimated = self._estimate(plans, name)
        if self.measures:  # it did not fit, whatever is counted
            return replace(estimated, variable=max(estimated.variable, int(self.target)))
        return estimated

    def _estimate(self, plans: Mapping[str, Any], name: str) -> StepMemory:
        configuration = PlansManager(dict(plans)).get_configuration(name).configuration
        if configuration["batch_size"] > MANY:
            smaller = ({**configuration, "batch_size": batch_size} for batch_size in (FEW, MANY))
            few, many = (self._estimate(single_configuration(plans, name, c), name) for c in smaller)
            return few.extrapolated(many, (configuration["batch_size"] - FEW) / (MANY - FEW))
        # 3d_fullres and 3d_lowres often come to the same sizes
        parts = [*(configuration[k] for k in SIZE_KEYS), "previous_stage" in configuration, plans.get(PLANS_KEY)]
        key = json.dumps(parts)
        if key not in self.estimates:
            self.estimates[key] = estimate(self.trainer_class, plans, name, self.dataset_json)
        return self.estimates[key]

    def _find_trainer(self, name: str) -> type:
        if name.split("_")[0] in self.others:
            self.trainer = name.split("_")[0]
        try:
            trainer_class = find_trainer(name)
        except AttributeError as error:
            raise ValueError(str(error)) from error
        if not issubclass(trainer_class, find_trainer(self.trainer)):
            raise ValueError(f"{type(self).__name__} plans for {self.trainer} and its variants, not for {name}.")
        return trainer_class

    def _provenance(self, how: str, blocks: Mapping[str, Any]) -> dict[str, Any]:
        """How the plans with these settings were made."""
        return {
            "base_plans": self.base_plans,
            "trainer": self.trainer_class.__name__,
            "gpu_memory_target_gb": self.target_gb,
            "memory": how,
            "needed_gb": {name: round(planned.memory.total / GIB, 2) for name, planned in self.results.items()},
        }

    def _say_what_to_do(self) -> None:
        number = dataset_id(self.dataset)
        missing = [
            name
            for name, planned in self.results.items()
            if not (self.folder / planned.data_identifier).is_dir()
            and "inherits_from" not in self.base["configurations"][name]
        ]
        if missing:
            print(
                f"Not preprocessed yet: {', '.join(missing)}. Run nnUNetv2_preprocess -d {number} -plans_name "
                f"{self.plans_name} -c {' '.join(missing)}"
            )
        print(
            f"Train with: nnUNetv2_train {number} {self.configurations[-1]} FOLD -tr {self.trainer_class.__name__} "
            f"-p {self.plans_name}"
        )


def single_configuration(plans: Mapping[str, Any], name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The plans with this one configuration, which is complete and inherits nothing."""
    complete = {k: v for k, v in configuration.items() if k != "inherits_from"}
    return {**plans, "configurations": {name: complete}}


def times(shape: Sequence[int]) -> str:
    return " x ".join(str(s) for s in shape)
