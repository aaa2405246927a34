"""One picture per test case: image, truth, predictions, and where DMED-Seg trusted which expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_diffext.evaluation.metrics import read_label_map

COLOURS = matplotlib.colormaps["tab10"].colors


def _best_slice(truth: np.ndarray) -> int:
    """Slice along the first axis with most voxels of the highest label that is present, the hardest one."""
    return int((truth == truth.max()).sum(axis=(1, 2)).argmax())


def _corresponding(index: int, slices: int, other: int) -> int:
    """Slice of a stack of ``other`` slices at the same height as slice ``index`` of ``slices``."""
    return min(other - 1, int((index + 0.5) * other / slices))


def draw_case(
    image_file: Path,
    truth_file: Path,
    predictions: Mapping[str, Path],
    maps: Mapping[str, np.ndarray],
    labels: Mapping[str, int],
    out: Path,
) -> None:
    """Write one row of panels as PNG.

    Args:
        image_file: single-channel 3D image.
        truth_file: its labels.
        predictions: title -> predicted labels.
        maps: result of `nnunet_diffext.inference.experts.expert_maps`; ``weight_de`` and ``confidence`` are drawn. They
            are on the preprocessed grid, which for the demo's data covers the same field of view as the image.
        labels: name -> value.
        out: the PNG; its folder is made.
    """
    image, spacing = read_label_map(image_file)
    truth, _ = read_label_map(truth_file)
    z = _best_slice(truth)
    height, width = image.shape[1:]
    extent = (0.0, width * spacing[2], height * spacing[1], 0.0)
    overlays = {"truth": truth, **{title: read_label_map(file)[0] for title, file in predictions.items()}}
    panels = [("weight of the diffusion expert", maps["weight_de"]), ("confidence", maps["confidence"])]
    names = {value: name for name, value in labels.items() if value != 0}
    colours = ListedColormap([COLOURS[(value - 1) % len(COLOURS)] for value in sorted(names)])
    norm = BoundaryNorm([v - 0.5 for v in sorted(names)] + [max(names) + 0.5], colours.N)

    figure = Figure(figsize=(3 * (1 + len(overlays) + len(panels)), 3.6), layout="constrained")
    axes = list(figure.subplots(1, 1 + len(overlays) + len(panels)))
    for axis, (title, overlay) in zip(axes, {"image": None, **overlays}.items(), strict=False):
        axis.imshow(image[z], cmap="gray", extent=extent)
        if overlay is not None:
            visible = np.ma.masked_equal(overlay[z], 0)
            axis.imshow(visible, cmap=colours, norm=norm, alpha=0.6, extent=extent, interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis, (title, values) in zip(axes[1 + len(overlays) :], panels, strict=True):
        values = np.asarray(values)
        slice_ = values[_corresponding(z, len(truth), len(values))]
        picture = axis.imshow(slice_, cmap="viridis", vmin=0, vmax=1, extent=extent)
        figure.colorbar(picture, ax=axis, shrink=0.7)
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    patches = [Patch(color=COLOURS[(v - 1) % len(COLOURS)], label=names[v]) for v in sorted(names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.suptitle(f"{truth_file.name.split('.')[0]}, slice {z}", fontsize=10)
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # A Figure without pyplot has no window and no global state, so nothing is to be closed.
    figure.savefig(out, dpi=110)
