"""M4oEPlanner: patches that windows tile, sized to as many experts as there are modalities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planned_dataset import NUMBER, Planned
from small_plans import plans_for

from nnunet_diffext.cli.main import main
from nnunet_diffext.networks.m4oe import M4oENet
from nnunet_diffext.planners.base import DiffextPlanner
from nnunet_diffext.planners.dry_run import DryRun, estimate
from nnunet_diffext.planners.m4oe import MAX_PADDING, M4oEPlanner, padding
from nnunet_diffext.planners.topology import Topology, topologies
from nnunet_diffext.settings import PLANS_KEY
from nnunet_diffext.trainers import find_trainer

PLANS = "nnUNetM4oEPlans"
SMALL = "M4oETrainer_dim12"
"""Quick to estimate; patches are the same."""
ARGUMENTS: dict[str, Any] = {"embed_dim": 12}
BLOCK = plans_for((8, 8, 8))["configurations"]["conf"]["architecture"]


def modalities(planned: Planned, names: list[str]) -> dict[str, Any]:
    """``dataset.json`` with cases of these modalities."""
    content = {**planned.read("dataset"), "diffext": {"modalities": {f"case_{name}": name for name in names}}}
    planned.write("dataset", content)
    return content


def size(configuration: dict[str, Any]) -> Topology:
    block = configuration["architecture"]["arch_kwargs"]
    shape = [tuple(map(tuple, block[key])) for key in ("strides", "kernel_sizes")]
    return Topology(tuple(configuration["patch_size"]), *shape)


def test_plans_of_several_modalities(planned: Planned) -> None:
    """They fit the target, hardly anything is padding, and the trainer builds its network from them."""
    dataset_json = modalities(planned, ["CT", "MR"])
    options = ("-pl", "M4oEPlanner", "-device", "cpu", "-c", "3d_fullres", "-tr", SMALL, "-gpu_memory_target", "2")
    assert main(["plan", "-d", str(NUMBER), *options]) == 0
    plans = planned.read(PLANS)
    configuration = plans["configurations"]["3d_fullres"]
    assert padding(size(configuration), configuration["architecture"], ARGUMENTS) <= MAX_PADDING
    step = DryRun(find_trainer(SMALL), plans, "3d_fullres", dataset_json)
    assert isinstance(step.network, M4oENet) and step.network.modalities == ("CT", "MR")
    assert plans[PLANS_KEY]["planner"]["needed_gb"]["3d_fullres"] <= 2
    assert estimate(find_trainer(SMALL), plans, "3d_fullres", dataset_json).total <= 2 * 2**30
    with torch.no_grad():
        out = step.network.eval()(torch.randn(1, 1, *configuration["patch_size"]))
    assert out.shape == (1, 2, *configuration["patch_size"])


def test_more_experts_need_more_memory(planned: Planned) -> None:
    """Their activations as well as their parameters. One modality has three experts, if there is a gate."""
    plans = planned.read("nnUNetPlans")

    def needed(names: list[str], trainer: str = SMALL) -> Any:
        return estimate(find_trainer(trainer), plans, "3d_fullres", modalities(planned, names))

    one, four = needed(["CT"]), needed(["CT", "MR", "US", "PET"])
    plain, hard = needed(["CT"], f"{SMALL}_woMoE"), needed(["CT"], f"{SMALL}_noGN")
    three = needed(["CT", "MR", "US"], f"{SMALL}_noGN")
    assert plain.variable < one.variable < four.variable
    assert plain.fixed < one.fixed < four.fixed and hard.fixed < three.fixed


def test_planned_for_the_pretraining(planned: Planned) -> None:
    """Under the same name, since both phases have to use the same plans. Its step also sees unlabelled images."""
    planner = M4oEPlanner(NUMBER, 2, trainer_name="M4oEPretrainTrainer_dim12", configurations=["3d_fullres"])
    planner.plan_experiment()
    assert planner.plans_name == PLANS and planner.results["3d_fullres"].memory.total <= planner.target
    assert planned.read(PLANS)[PLANS_KEY]["planner"]["trainer"] == "M4oEPretrainTrainer_dim12"


def test_padded_patches_are_left_out(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the patches that nnU-Net would take; if all are padded much, there is no choice."""
    planner = M4oEPlanner(NUMBER, 8, trainer_name=SMALL, configurations=["3d_fullres"])
    base = planned.read("nnUNetPlans")["configurations"]["3d_fullres"]
    every = DiffextPlanner.candidates(planner, base)
    for limit in (every[0].voxels, every[-1].voxels):
        shares = {t: MAX_PADDING + (0.01 if t.voxels >= limit else -0.01) for t in every}
        monkeypatch.setattr("nnunet_diffext.planners.m4oe.padding", lambda t, *_, shares=shares: shares[t])
        small = [t for t in every if t.voxels < limit]
        assert planner.candidates(base) == (small or every) and len(small) < len(every)


@pytest.mark.parametrize(
    ("spacing", "shape"), [((1, 1, 1), (52, 60, 70)), ((5, 1, 1), (9, 100, 100)), ((4, 0.7, 0.7), (22, 300, 280))]
)
def test_windows_tile_the_patches_that_nnunet_considers(spacing: tuple[float, ...], shape: tuple[int, ...]) -> None:
    """So that hardly any planning has to leave one out."""
    patches = list(topologies(spacing, shape))
    assert len(patches) > 10 and all(padding(t, BLOCK, ARGUMENTS) <= MAX_PADDING for t in patches)


def test_padding_by_hand() -> None:
    """26 voxels are 13 tokens, which windows of 7 make 14; 24 are 12, two windows of 6; 8 are a single window."""
    for patch, share in (((26, 24, 8), 14 / 13 - 1), ((52, 52, 52), (28 / 26) ** 3 - 1), ((24, 28, 32), 0)):
        topology = Topology(patch, ((1, 1, 1), (2, 2, 2), (1, 1, 1)), ((3, 3, 3),) * 3)
        assert padding(topology, BLOCK, ARGUMENTS) == pytest.approx(share)
    single = Topology((6, 6, 6), ((1, 1, 1),), ((3, 3, 3),))
    assert padding(single, BLOCK, ARGUMENTS) == float("inf"), "a Swin U-Net has two levels at least"


def test_other_trainers_are_refused(planned: Planned) -> None:
    with pytest.raises(ValueError, match="M4oEPlanner plans for M4oETrainer"):
        M4oEPlanner(NUMBER, 4, trainer_name="DMEDSegTrainer", configurations=["3d_fullres"])
