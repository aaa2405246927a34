"""Plans for PGRD: the prior's own patch, with the batch and the width of the denoiser sized to what is left."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from math import prod
from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffext.planners.base import DiffextPlanner, Planned, single_configuration, times
from nnunet_diffext.planners.memory import StepMemory
from nnunet_diffext.planners.search import MIN_BATCH, Known, first_that_fits
from nnunet_diffext.planners.topology import require_unet
from nnunet_diffext.settings import PLANNER_KEY, PLANS_KEY


class PGRDPlanner(DiffextPlanner):
    """Keeps patch and architecture, which the prior's weights depend on.

    The denoiser keeps the width of its settings if two samples fit; then the batch grows, by nnU-Net's rule. A GPU that
    is too small for two samples gets a narrower denoiser. Plans hold one width for all configurations: the narrowest
    that any of them needs, beside the one that was wanted: planning again starts from that.
    """

    trainer = "PGRDTrainer"
    default_plans_name = "nnUNetPGRDPlans"
    narrower: ClassVar[tuple[float, ...]] = (1.0, 0.75, 0.5, 0.25)
    """Widths that are tried, relative to those of the settings."""
    widths: ClassVar[tuple[str, ...]] = ("context_width", "step_width")

    def _of_the_user(self, blocks: dict[str, Any]) -> dict[str, Any]:
        """Widths that are still as an earlier planning narrowed them become the user's again."""
        blocks = deepcopy(blocks)
        own = blocks.setdefault(self.trainer, {})
        for key, width in blocks.get(PLANNER_KEY, {}).get("narrowed", {}).items():
            if own.get(key) == width["planned"]:
                own[key] = width["wanted"]
                if own[key] is None:  # the default
                    del own[key]
        self._wanted = {key: own.get(key) for key in self.widths}
        return blocks

    def _provenance(self, how: str, blocks: Mapping[str, Any]) -> dict[str, Any]:
        own = blocks[self.trainer]
        narrowed = {
            key: {"wanted": wanted, "planned": own[key]}
            for key, wanted in self._wanted.items()
            if own.get(key) != wanted
        }
        return {**super()._provenance(how, blocks), **({"narrowed": narrowed} if narrowed else {})}

    def _plan(self, plans: dict[str, Any], name: str) -> Planned:
        """Add one configuration to the plans."""
        own = plans["configurations"][name] = dict(self.base["configurations"][name])
        base = PlansManager(self.base).get_configuration(name).configuration
        require_unet(base["architecture"])
        base_memory = self._estimate(single_configuration(plans, name, base), name)
        memory = self._fit_width(plans, name, base)

        def with_batch(size: int) -> StepMemory:
            return self._needed(single_configuration(plans, name, {**base, "batch_size": size}), name)

        voxels = prod(base["patch_size"])
        batches = range(max(MIN_BATCH, self.max_batch(name, voxels)), MIN_BATCH, -1)
        sizes = [b * voxels for b in batches]
        more = first_that_fits(sizes, lambda i: with_batch(batches[i]), self.target, Known(memory, MIN_BATCH * voxels))
        own["batch_size"], memory = (batches[more[0]], more[1]) if more is not None else (MIN_BATCH, memory)
        patch = tuple(base["patch_size"])
        return Planned(
            patch, own["batch_size"], memory, patch, base["batch_size"], base_memory,
            PlansManager(plans).get_configuration(name).data_identifier,
        )  # fmt: skip

    def _fit_width(self, plans: dict[str, Any], name: str, base: dict[str, Any]) -> StepMemory:
        """Narrow the denoiser in the plans' settings until two samples fit; returns what they need.

        Raises:
            ValueError: not even the narrowest fits.
        """
        settings = self.trainer_class.Settings.resolve(plans[PLANS_KEY].get(self.trainer), self.trainer_class.overrides)
        own = plans[PLANS_KEY][self.trainer]
        sample = {**base, "batch_size": MIN_BATCH}
        for factor in self.narrower:
            if factor < 1:
                own.update({key: round(factor * getattr(settings, key), 4) for key in self.widths})
            memory = self._needed(single_configuration(plans, name, sample), name)
            if memory.total <= self.target:
                if factor < 1:
                    print(f"  {name}: denoiser narrowed to context_width {own['context_width']}.")
                return memory
        raise ValueError(
            f"{self.dataset}, {name}: {self.trainer_class.__name__} does not fit into {self.target_gb:g} GB. With the "
            f"prior's patch, {times(base['patch_size'])}, {MIN_BATCH} samples and its narrowest denoiser, it needs "
            f"{memory}. Plan the prior for a smaller GPU first: nnUNetv2_plan_experiment -gpu_memory_target "
            f"{max(1, int(self.target_gb / 2))}, train it with these plans, and plan from them (-p)."
        )
