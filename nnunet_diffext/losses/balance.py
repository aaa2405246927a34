"""Loss on the gates of a mixture of experts (M4oE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_diffext.networks.blocks.experts import Gate


def balance_loss(gates: Sequence[Gate]) -> Tensor:
    """Load balancing of every layer, mean over layers; 1 if all experts are used alike, up to M if one is.

    ``M sum_m f_m P_m`` of Switch Transformers (Fedus et al. 2022, eq. 4): ``P`` are the mean probabilities over the
    batch, ``f`` the experts' shares in what was computed. With top-1 routing ``f`` counts tokens. With soft gates it is
    ``P`` without its gradient, which gives half of the importance loss of Shazeer et al. (2017, eq. 7).

    Layers must not be pooled: each could use a single expert, and all together would still look balanced.

    The batch is balanced, not every sample: few samples of few modalities keep experts from specialising.

    Args:
        gates: of every layer.
    Raises:
        ValueError: no gate.
    """
    if not gates:
        raise ValueError("No layer has a gate over experts that could be balanced.")
    layers = [gate.load.mean(0) @ gate.mean.mean(0) for gate in gates]
    return gates[0].load.shape[1] * torch.stack(layers).mean()
