"""``nnUNetTrainer_30epochs_100iters_seed1``: the stock trainer on another budget, which its name records.

This is the baseline to run beside every method: nothing but the numbers in the name differs from nnU-Net.
"""

from __future__ import annotations

from nnunet_diffext.trainers.configured import ConfiguredTrainer


class nnUNetTrainer(ConfiguredTrainer):  # noqa: N801 - nnU-Net's own name, extended by tokens
    """nnU-Net's trainer with the tokens of :class:`nnunet_diffext.settings.TrainingSettings`."""

    base_name = "nnUNetTrainer"
