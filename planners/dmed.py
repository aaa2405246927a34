"""Plans for DMED-Seg: two experts, a diffusion pass and a teacher instead of one network."""

from __future__ import annotations

from nnunet_diffext.planners.base import DiffextPlanner


class DMEDPlanner(DiffextPlanner):
    """Sizes patch and batch for :class:`~nnunet_diffext.trainers.dmed.DMEDSegTrainer` with unlabelled images.

    Without unlabelled images a step needs less: there is no teacher pass.
    """

    trainer = "DMEDSegTrainer"
    default_plans_name = "nnUNetDMEDPlans"
