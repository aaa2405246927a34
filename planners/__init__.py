"""The planners, by name. nnU-Net finds none outside of its own package, so ``nnunet_diffext plan`` runs them."""

from __future__ import annotations

from importlib import import_module

PLANNERS: dict[str, str] = {
    "DMEDPlanner": "nnunet_diffext.planners.dmed",
    "LatentPlanner": "nnunet_diffext.planners.latent",
    "M4oEPlanner": "nnunet_diffext.planners.m4oe",
    "PGRDPlanner": "nnunet_diffext.planners.pgrd",
}
"""Planner name -> module, imported only when the planner is asked for."""


def find_planner(name: str) -> type:
    """The planner class called ``name``.

    Raises:
        ValueError: there is none (the known ones are listed).
    """
    if name not in PLANNERS:
        raise ValueError(
            f"There is no planner '{name}'; this package has {', '.join(PLANNERS)}. nnU-Net's own planners run with "
            "nnUNetv2_plan_experiment."
        )
    return getattr(import_module(PLANNERS[name]), name)
