"""Plans for the latent methods, whose patches can be larger than nnU-Net's: only masks pass their fine decoders."""

from __future__ import annotations

from nnunet_diffext.planners.base import DiffextPlanner
from nnunet_diffext.trainers import find_trainer


class LatentPlanner(DiffextPlanner):
    """Largest patch, then batch, that the training step of a latent method allows; every stride divides the patch.

    Plans for LEAFTrainer, or with ``-tr`` for TextDiffSegTrainer. The mask autoencoder that both may build on is
    trained with the same plans, and needs less memory than either.
    """

    trainer = "LEAFTrainer"
    default_plans_name = "nnUNetLatentPlans"
    others = ("TextDiffSegTrainer",)

    def _find_trainer(self, name: str) -> type:
        base = name.split("_")[0]
        if base not in self.others:
            return super()._find_trainer(name)
        self.trainer = base
        return find_trainer(name)
