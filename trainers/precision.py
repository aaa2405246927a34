"""Where bfloat16 may be used on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def check_bfloat16(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Refuse bfloat16 where it is slow, or wrong.

    oneDNN (torch 2.15) leaves parts of the weight gradient of a 3x3x3 convolution over two slices unwritten.

    Args:
        patch_size: voxels.
        strides: of every stage of the network.
    Raises:
        ValueError: the CPU does not compute bfloat16, or some stage sees two slices.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise ValueError("Token 'bf16': this CPU does not compute bfloat16 natively. Leave the token out.")
    depths = patch_size[0] // np.cumprod(np.vstack(strides), axis=0)[:, 0]
    if len(patch_size) == 3 and 2 in depths:
        raise ValueError(
            f"Token 'bf16': some stage of this network sees two slices (depths {depths.tolist()}), for which "
            "PyTorch's CPU convolutions compute wrong bfloat16 gradients. Leave the token out, or change the patch."
        )
