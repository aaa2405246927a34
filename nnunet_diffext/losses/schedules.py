"""Loss weights that change during training."""

from __future__ import annotations

import math


def gaussian_ramp(progress: float, length: float) -> float:
    """``exp(-5 (1 - p)^2)``, ``p = progress / length`` clipped to [0, 1] (Laine and Aila 2017; DMED-Seg 4.1).

    Args:
        progress: share of the training that is done, in [0, 1].
        length: share of the training after which the weight is 1; 0 means from the start.
    """
    if length <= 0:
        return 1.0
    p = min(max(progress / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - p) ** 2)
