"""The one module that nnU-Net scans (``nnUNet_extTrainer``); :mod:`nnunet_diffext.trainers` answers for it.

Classes therefore live in an importable package: they pickle, and a second look-up finds the same object.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from nnunet_diffext import trainers
    from nnunet_diffext.variants import UnknownTokenError

    try:
        return trainers.find_trainer(name)
    except UnknownTokenError as error:
        if not name.startswith("nnUNetTrainer"):
            raise
        # may be a trainer of the user's, in another directory that nnU-Net has yet to search
        print(f"nnunet_diffext: {error}")
        raise AttributeError(name) from error
