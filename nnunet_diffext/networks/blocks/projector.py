"""Maps features of a convolutional network onto those of a vision transformer; needed in training only."""

from __future__ import annotations

from torch import Tensor, nn

PROJECTORS = ("mlp", "conv")


class Projector(nn.Module):
    """``phi`` of LEAF, eq. 5: the same map at every location, ``(N, channels, h, w)`` -> ``(N, out, h, w)``.

    Args:
        channels: of the features.
        out: D, of the teacher's tokens.
        kind: ``"mlp"``: three layers with SiLU, as in REPA (Yu et al. 2025) and the authors' code; ``"conv"``: one 3x3
            convolution (iREPA, arXiv 2512.10794), cheaper and with spatial context.
        hidden: width of the MLP.
    """

    def __init__(self, channels: int, out: int, kind: str = "mlp", hidden: int = 2048) -> None:
        super().__init__()
        if kind not in PROJECTORS:
            raise ValueError(f"unknown projector {kind!r}; choose one of {', '.join(PROJECTORS)}")
        if kind == "conv":
            self.layers: nn.Module = nn.Conv2d(channels, out, 3, padding=1)
            return
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, out, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.layers(features)
