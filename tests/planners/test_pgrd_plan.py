"""PGRDPlanner: the prior's patch is kept; batch and denoiser follow the memory target."""

from __future__ import annotations

import pytest
import torch
from planned_dataset import NAME, NUMBER, Planned

from nnunet_diffext.cli.main import main
from nnunet_diffext.planners.dry_run import DryRun, estimate
from nnunet_diffext.planners.memory import CONTEXT, GIB, fixed_bytes, size_in_bytes
from nnunet_diffext.planners.pgrd import PGRDPlanner
from nnunet_diffext.settings import PLANS_KEY
from nnunet_diffext.trainers import find_trainer

PLANS, TRAINER = "nnUNetPGRDPlans", "PGRDTrainer"


def narrow(planned: Planned, factor: float) -> float:
    """GB of the base plans with a batch of two and a denoiser of this relative width."""
    plans = planned.read("nnUNetPlans")
    plans["configurations"]["3d_fullres"]["batch_size"] = 2
    plans[PLANS_KEY] = {TRAINER: {"context_width": 0.5 * factor, "step_width": 0.25 * factor}}
    return estimate(find_trainer(TRAINER), plans, "3d_fullres", planned.read("dataset")).total / GIB


def test_the_patch_of_the_prior_is_kept_and_the_batch_grows(planned: Planned) -> None:
    planned.write("dataset", {**planned.read("dataset"), "numTraining": 120})
    base = planned.read("nnUNetPlans")["configurations"]["3d_fullres"]
    assert main(["plan", "-d", str(NUMBER), "-pl", "PGRDPlanner", "-device", "cpu", "-c", "3d_fullres"]) == 0
    new = planned.read(PLANS)
    configuration = new["configurations"]["3d_fullres"]
    assert {k: v for k, v in configuration.items() if k != "batch_size"} == {
        k: v for k, v in base.items() if k != "batch_size"
    }
    assert configuration["batch_size"] == 6  # nnU-Net's rule: 5 % of 120 volumes of one patch each
    assert "context_width" not in new[PLANS_KEY][TRAINER]
    assert new[PLANS_KEY]["planner"]["base_plans"] == "nnUNetPlans"  # where the training looks for the prior


def test_a_small_gpu_gets_a_narrower_denoiser(planned: Planned) -> None:
    full, half = narrow(planned, 1), narrow(planned, 0.5)
    assert half < full
    planner = PGRDPlanner(NUMBER, (full + half) / 2, configurations=["3d_fullres"])
    planner.plan_experiment()
    settings = planned.read(PLANS)[PLANS_KEY][TRAINER]
    assert settings["context_width"] < 0.5 and settings["step_width"] == settings["context_width"] / 2
    assert planner.results["3d_fullres"].memory.total <= planner.target


def test_more_memory_gives_the_wanted_width_back(planned: Planned) -> None:
    estimates: dict = {}

    def planned_for(gigabytes: float) -> dict:
        planner = PGRDPlanner(NUMBER, gigabytes, configurations=["3d_fullres"])
        planner.estimates = estimates
        planner.plan_experiment()
        return planned.read(PLANS)[PLANS_KEY]

    small, large = narrow(planned, 0.4), narrow(planned, 1.5)
    narrowed = planned_for(small)[TRAINER]
    assert narrowed["context_width"] < 0.5
    assert planned_for(small)[TRAINER] == narrowed, "planning twice narrows no further"
    wide = planned_for(large)
    assert wide[TRAINER] == {} and "narrowed" not in wide["planner"]
    planned_for(small)
    by_hand = planned.read(PLANS)
    by_hand[PLANS_KEY][TRAINER].update(context_width=0.3)  # a width that the user has chosen since
    planned.write(PLANS, by_hand)
    assert planned_for(small)[TRAINER]["context_width"] < 0.3
    assert planned_for(large)[TRAINER] == {"context_width": 0.3}


def test_a_gpu_that_cannot_hold_the_prior_is_refused(planned: Planned) -> None:
    with pytest.raises(ValueError, match=rf"{NAME}, 3d_fullres: PGRDTrainer does not fit into 0.8 GB.*narrowest"):
        PGRDPlanner(NUMBER, 0.8, configurations=["3d_fullres"]).plan_experiment()


def test_the_frozen_prior_has_no_moments(planned: Planned) -> None:
    step = DryRun(find_trainer(TRAINER), planned.read("nnUNetPlans"), "3d_fullres", planned.read("dataset"))
    trained = [p for p in step.network.parameters() if p.requires_grad]
    assert not {id(p) for p in trained} & {id(p) for p in step.network.prior.parameters()}
    step.train()
    states = step.trainer.optimizer.state.values()
    moments = sum(t.numel() * 4 for state in states for t in state.values() if torch.is_tensor(t) and t.ndim)
    assert fixed_bytes(step) == size_in_bytes(step.network) + size_in_bytes(step.teacher) + moments
    assert (
        fixed_bytes(step) + CONTEXT
        == estimate(find_trainer(TRAINER), planned.read("nnUNetPlans"), "3d_fullres", planned.read("dataset")).fixed
    )
