"""Plans for the latent methods, whose patches can be larger than nnU-Net's: only masks pass their fine decoders."""

from __future__ import annotations

from nnunet_diffext.planners.base import DiffextPlanner


class LatentPlanner(DiffextPlanner):
    """Largest patch, then batch, that the training step of a latent method allows; every stride divides the patch.

    Plans for LEAFTrainer, or with ``-tr`` for TextDiffSegTrainer. The mask autoencoder that both may build on is
    trained with the same plans, and needs less memory than either. What LEAF's teacher needs is not counted.
    """

    trainer = "LEAFTrainer"
    default_plans_name = "nnUNetLatentPlans"
    others = ("TextDiffSegTrainer",)
