"""LatentPlanner: larger patches than DMED-Seg's within the same memory, for both latent methods."""

from __future__ import annotations

from math import prod

import pytest
from planned_dataset import NUMBER, Planned

from nnunet_diffext.planners.dry_run import estimate
from nnunet_diffext.planners.latent import LatentPlanner
from nnunet_diffext.trainers import find_trainer

ONE = {"configurations": ["3d_fullres"]}


@pytest.mark.parametrize("trainer", ["LEAFTrainer_noAlign", "TextDiffSegTrainer_randomText"])
def test_patch_and_batch_fit_the_target(planned: Planned, trainer: str) -> None:
    planner = LatentPlanner(NUMBER, 4, trainer_name=trainer, **ONE)
    planner.plan_experiment()
    result = planner.results["3d_fullres"]
    assert result.memory.total <= planner.target
    new = planned.read("nnUNetLatentPlans")["configurations"]["3d_fullres"]
    strides = new["architecture"]["arch_kwargs"]["strides"]
    assert all(p % prod(s[i] for s in strides) == 0 for i, p in enumerate(new["patch_size"]))
    assert all(p % s == 0 for p, s in zip(new["patch_size"], (8, 8, 8), strict=True)), "latents of stride 8"


def test_a_step_needs_less_than_that_of_dmed(planned: Planned) -> None:
    """Why patches can be larger. The plan is the same for both."""
    plans, dataset = planned.read("nnUNetPlans"), planned.read("dataset")
    leaf, dmed = (
        estimate(find_trainer(name), plans, "3d_fullres", dataset) for name in ("LEAFTrainer_noAlign", "DMEDSegTrainer")
    )
    assert leaf.variable < dmed.variable


def test_other_trainers_are_refused(planned: Planned) -> None:
    with pytest.raises(ValueError, match="LatentPlanner plans for LEAFTrainer"):
        LatentPlanner(NUMBER, 4, trainer_name="DMEDSegTrainer", **ONE)
