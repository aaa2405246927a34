"""The one module that nnU-Net scans (``nnUNet_extTrainer``): it hands every look-up on to :mod:`nnunet_diffext.trainers`.

Classes therefore live in an importable package: they pickle, and a second look-up finds the same object.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from nnunet_diffext import trainers

    return trainers.find_trainer(name)
