"""Plans for M4oE: patches that windows of attention tile without much padding, sized to several experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from nnunet_diffext.networks.architecture import Architecture
from nnunet_diffext.networks.swin_unet import SwinPlan
from nnunet_diffext.planners.base import DiffextPlanner
from nnunet_diffext.planners.topology import Topology
from nnunet_diffext.settings import PLANS_KEY

MAX_PADDING = 0.1
"""Share of the finest level's tokens that may be padding."""


class M4oEPlanner(DiffextPlanner):
    """Largest patch, then batch, that the training step allows. Windows tile the finest level, or nearly so.

    Plans for M4oETrainer, or with ``-tr`` for M4oEPretrainTrainer, which has to use the same plans.
    """

    trainer = "M4oETrainer"
    others = ("M4oEPretrainTrainer",)
    default_plans_name = "nnUNetM4oEPlans"

    def candidates(self, base: Mapping[str, Any]) -> list[Topology]:
        """Those with little padding; all if there is none."""
        every = super().candidates(base)
        block = self.base.get(PLANS_KEY, {}).get(self.trainer)
        settings = self.trainer_class.Settings.resolve(block, self.trainer_class.overrides)
        snapped = [t for t in every if padding(t, base["architecture"], settings.network_arguments()) <= MAX_PADDING]
        return snapped or every


def padding(topology: Topology, architecture: Mapping[str, Any], arguments: Mapping[str, Any]) -> float:
    """Share of padding among the finest tokens; infinite for patches that are too small for a Swin U-Net."""
    block = topology.architecture(architecture)
    planned = Architecture.from_plans(block["network_class_name"], block["arch_kwargs"], block["_kw_requires_import"])
    try:
        plan = SwinPlan.of(planned, topology.patch_size, **arguments)
    except ValueError:
        return float("inf")
    grid, window = plan.grids[0], plan.windows[0]
    return prod(-(-g // w) * w for g, w in zip(grid, window, strict=True)) / prod(grid) - 1
