"""Reliability diagrams and risk-coverage curves, drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_diffext.evaluation.calibration import Calibration

IMAGE_COLOUR, BAND_COLOUR = matplotlib.colormaps["tab10"].colors[:2]
_STYLES = ((IMAGE_COLOUR, 3.0), (BAND_COLOUR, 1.2))  # the band is drawn upon the image, and both stay visible
MAX_COLUMNS = 4
_DRAWN_POINTS = 500

Pooled = Mapping[str, tuple[Calibration, Calibration]]
"""Label key, or that of the decision -> statistics of the whole image and of the band."""


def reliability_png(pooled: Pooled, titles: Mapping[str, str], band_mm: float) -> bytes:
    """Reliability diagram per entry: outcome against confidence per bin, the number of voxels per bin below it.

    Args:
        pooled: statistics of all cases.
        titles: key -> title of its panel.
        band_mm: width of the band, for the legend.

    Returns:
        A PNG.
    """
    columns = min(MAX_COLUMNS, len(pooled))
    rows = math.ceil(len(pooled) / columns)
    figure = Figure(figsize=(3.4 * columns, 4.4 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    names = ("whole image", f"within {band_mm:g} mm of foreground")
    for index, (key, pair) in enumerate(pooled.items()):
        row, column = divmod(index, columns)
        curve, histogram = grid[2 * row, column], grid[2 * row + 1, column]
        labelwise = pair[0].labelwise
        curve.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
        edges = np.linspace(0, 1, pair[0].table.shape[1] + 1)
        for statistics, name, (colour, width) in zip(pair, names, _STYLES, strict=True):
            confidence, outcome, count = statistics.reliability()
            # NaN breaks the line; bins without voxels are no gap in the calibration.
            known = count > 0
            style = {"color": colour, "linewidth": width}
            curve.plot(confidence[known], outcome[known], marker="o", markersize=1.5 + width, label=name, **style)
            histogram.stairs(count, edges, **style)
        curve.set(xlim=(0, 1), ylim=(0, 1), ylabel="share with label" if labelwise else "accuracy")
        curve.set_title(f"{titles[key]}\nECE {pair[0].ece:.4f}, band {pair[1].ece:.4f}", fontsize=9)
        histogram.set(xlim=(0, 1), ylabel="voxels", yscale="symlog")
        histogram.set_ylim(bottom=0)
        histogram.set_xlabel("probability of the label" if labelwise else "confidence of the decision")
    for unused in range(len(pooled), rows * columns):
        row, column = divmod(unused, columns)
        grid[2 * row, column].set_axis_off()
        grid[2 * row + 1, column].set_axis_off()
    # Outside, because a curve may run anywhere.
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, 2), fontsize=8, frameon=False)
    return _png(figure)


def risk_coverage_png(pooled: Pooled, titles: Mapping[str, str], band_mm: float) -> bytes:
    """Error rate among the most confident voxels against their share; whole image and band side by side.

    Args:
        pooled: statistics of all cases.
        titles: key -> entry in the legend.
        band_mm: width of the band, for the title.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes: list[Any] = list(figure.subplots(1, 2))
    colours = matplotlib.colormaps["tab10"].colors
    for part, (axis, title) in enumerate(
        zip(axes, ("whole image", f"within {band_mm:g} mm of foreground"), strict=True)
    ):
        for index, (key, pair) in enumerate(pooled.items()):
            coverage, risk = pair[part].risk_coverage()
            if not coverage.size:
                continue
            # Thousands of bins, nearly all of them within the last pixel: as many as can be seen are drawn.
            drawn = np.unique(np.searchsorted(coverage, np.linspace(coverage[0], 1, _DRAWN_POINTS)))
            drawn = drawn[drawn < coverage.size]
            label = f"{titles[key]}: AURC {pair[part].aurc:.4g}"
            axis.plot(coverage[drawn], risk[drawn], color=colours[index % len(colours)], label=label)
        axis.set(xlim=(0, 1), title=title, xlabel="coverage: share of most confident voxels", ylabel="error rate")
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    # A Figure without pyplot has no window and no global state, so nothing is to be closed.
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
