"""Which experts a mixture uses, per layer and modality: counted during an epoch, written and drawn after it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from nnunet_diffext.files import write_atomically
from nnunet_diffext.networks.blocks.experts import Gate

USAGE = "expert_usage"
STARVED = 0.1
"""An expert that gets less than this share of its even part is said to starve."""


class ExpertUsage:
    """Mean weight of every expert, over the samples that were added.

    Args:
        modalities: names, in the order of their experts.
        experts: M.
        inactive: experts that must not be used, which are not starved.
    """

    def __init__(self, modalities: Sequence[str], experts: int, inactive: Collection[int] = ()) -> None:
        self.inactive = frozenset(inactive)
        self.modalities, self.experts = tuple(modalities), experts
        self.layers: list[str] = []
        self._sums: Tensor | float = 0.0
        self._counts = torch.zeros(len(self.modalities))
        self._told: list[bool] = []

    @torch.no_grad()
    def add(
        self, encoder: Sequence[Gate], decoder: Sequence[Gate], modality: Tensor, told: Tensor | None = None
    ) -> None:
        """Count a batch.

        Args:
            encoder, decoder: gates of their layers, if they have any.
            modality: ``(B,)``.
            told: ``(B, modalities)``, what the modality gate says.
        """
        if told is not None:
            self._told += (told.argmax(1) == modality).tolist()
        if not (encoder or decoder):
            return
        self.layers = [f"encoder {i}" for i in range(len(encoder))] + [f"decoder {i}" for i in range(len(decoder))]
        load = torch.stack([gate.load for gate in (*encoder, *decoder)], dim=1).float().cpu()  # (B, layers, M)
        own = torch.nn.functional.one_hot(modality.cpu(), len(self.modalities)).float()
        self._sums = self._sums + torch.einsum("bn,blm->nlm", own, load)
        self._counts += own.sum(0)

    @property
    def empty(self) -> bool:
        """No gate was added."""
        return not self.layers

    @property
    def told(self) -> float:
        """Share of the samples whose modality was told; NaN if nothing tells it."""
        return sum(self._told) / len(self._told) if self._told else math.nan

    def mean(self) -> Tensor:
        """``(modalities, layers, M)``, NaN for modalities without samples."""
        return self._sums / self._counts.view(-1, 1, 1)

    def starved(self) -> Iterator[tuple[int, str]]:
        """Experts that hardly anything of any modality reaches in most layers: which, and the same in words.

        The expert of a rare modality is not one of them as long as that modality uses it.
        """
        if self.empty:
            return
        highest = self.mean()[self._counts > 0].amax(0)  # (layers, M)
        least = STARVED / self.experts
        for m in sorted(set(range(self.experts)) - self.inactive):
            layers = int((highest[:, m] < least).sum())
            if 2 * layers > len(self.layers):
                of = f" (of {self.modalities[m]})" if m < len(self.modalities) else ""
                share = f"less than {least:.1%} of the weight in {layers} of {len(self.layers)} layers"
                yield (
                    m,
                    f"expert {m}{of} gets {share} and learns next to nothing; the token balance0p01 spreads the load.",
                )

    def save(self, folder: str | Path, epoch: int) -> None:
        """Write ``expert_usage.json`` and ``expert_usage.png``."""
        folder = Path(folder)
        usage = [[[round(v, 5) for v in row] for row in layers] for layers in self.mean().tolist()]
        seen = [name for name, count in zip(self.modalities, self._counts.tolist(), strict=True) if count]
        content = {
            "epoch": epoch,
            "experts": self.experts,
            "layers": self.layers,
            "told": None if math.isnan(self.told) else round(self.told, 4),  # JSON has no NaN
            "usage": {name: u for name, u in zip(self.modalities, usage, strict=True) if name in seen},
        }
        write_atomically(folder / f"{USAGE}.json", json.dumps(content, indent=1) + "\n")
        write_atomically(folder / f"{USAGE}.png", self.png())

    def png(self) -> bytes:
        """A map per modality: layers from top to bottom, experts from left to right."""
        figure = Figure(figsize=(2.2 * len(self.modalities) + 1.5, 0.25 * len(self.layers) + 1.5), layout="constrained")
        panels = figure.subplots(1, len(self.modalities), squeeze=False, sharey=True)[0]
        for panel, name, usage in zip(panels, self.modalities, self.mean(), strict=True):
            shown = panel.imshow(usage.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
            panel.set(title=name, xlabel="expert", xticks=range(self.experts), yticks=range(len(self.layers)))
        panels[0].set_yticklabels(self.layers)
        figure.colorbar(shown, ax=list(panels), label="mean weight")
        out = io.BytesIO()
        FigureCanvasAgg(figure).print_png(out)
        return out.getvalue()
