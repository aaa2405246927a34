"""One strip of panels per case: the image, both outlines upon it, and where the model was unsure."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_diffext.evaluation.task import Task
from nnunet_diffext.report.images import CaseImages

REFERENCE_COLOUR, PREDICTION_COLOUR = "#4dd2ff", "#ffb000"
PANELS = ("image", "outlines", "uncertainty")
_COLOURS = (REFERENCE_COLOUR, PREDICTION_COLOUR)
_MARGIN, _SMALLEST = 0.35, 0.45  # of the foreground's box, and of the image: what is left around the structures
_WIDTH, _DPI = 2.9, 120  # inches per panel
_HALO = patheffects.withStroke(linewidth=2.5, foreground="black")  # legible upon bright tissue as well


def draw_case(images: CaseImages, task: Task) -> tuple[bytes, str]:
    """Draw the slice with most wrong voxels, across the axis with the thickest slices.

    Args:
        images: of the case.
        task: labels; outlines are drawn per label or region, ignored voxels are not errors.

    Returns:
        A PNG, and where the slice is.
    """
    axis, index, errors = worst_slice(images, task)
    planes = [np.take(a, index, axis) for a in (images.image, images.reference, images.prediction)]
    if images.entropy is not None:
        planes.append(np.take(images.entropy, index, axis))
    spacing = [s for i, s in enumerate(images.spacing) if i != axis]
    box = _crop((planes[1] > 0) | (planes[2] > 0), spacing)
    planes = [plane[box] for plane in planes]
    image = planes[0]
    height, width = image.shape[0] * spacing[0], image.shape[1] * spacing[1]
    extent = (0.0, width, height, 0.0)
    panels = len(planes) - 1  # image, outlines, uncertainty
    ratio = min(max(width / height, 0.5), 2.5)
    figure = Figure(figsize=(_WIDTH * panels, _WIDTH / ratio), facecolor="black")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    low, high = np.nanpercentile(image, (0.5, 99.5)) if np.isfinite(image).any() else (0.0, 1.0)
    for panel in axes[:2]:
        panel.imshow(image, cmap="gray", extent=extent, vmin=low, vmax=max(high, low + 1e-6))
    centres = [(np.arange(n) + 0.5) * step for n, step in zip(image.shape, spacing, strict=True)]
    for values in task.labels.values():
        for plane, colour, style in zip(planes[1:3], _COLOURS, ("solid", "dashed"), strict=True):
            mask = np.isin(plane, values)
            if mask.any():
                _outline(axes[1], mask, centres, spacing, colour, style)
    if images.entropy is not None:
        axes[2].imshow(planes[3], cmap="inferno", extent=extent, vmin=0, vmax=1)
    for panel, title in zip(axes, PANELS, strict=False):
        panel.set_axis_off()
        panel.text(
            0.02, 0.98, title, transform=panel.transAxes, va="top", color="white", fontsize=12, path_effects=[_HALO]
        )  # fmt: skip
        panel.set(xlim=(0, width), ylim=(height, 0))
    count = images.image.shape[axis]
    where = "the image" if count == 1 else f"slice {index + 1} of {count}"
    return _png(figure), f"{where}, {errors} wrong voxels in it"


def worst_slice(images: CaseImages, task: Task) -> tuple[int, int, int]:
    """Axis, index and number of wrong voxels of the slice to draw; without any error, that with most foreground.

    Slices are taken across the axis with the largest spacing, because in-plane resolution is what is best looked at.
    """
    axis = int(np.argmax(images.spacing)) if images.image.shape[0] > 1 else 0
    wrong = np.zeros(images.image.shape, bool)
    for values in task.labels.values():
        wrong |= np.isin(images.reference, values) != np.isin(images.prediction, values)
    if task.ignore_label is not None:
        wrong &= images.reference != task.ignore_label
    others = tuple(i for i in range(wrong.ndim) if i != axis)
    per_slice = wrong.sum(axis=others)
    if not per_slice.any():
        foreground = np.isin(images.reference, [v for values in task.labels.values() for v in values])
        per_slice = foreground.sum(axis=others)
    index = int(per_slice.argmax())
    return axis, index, int(np.take(wrong, index, axis).sum())


def _outline(
    panel: Axes, mask: np.ndarray, centres: Sequence[np.ndarray], spacing: Sequence[float], colour: str, style: str
) -> None:
    # A border of background closes outlines of masks that touch the edge of the picture.
    padded = np.pad(mask, 1).astype(np.float32)
    y, x = (np.concatenate([[c[0] - s], c, [c[-1] + s]]) for c, s in zip(centres, spacing, strict=True))
    line = panel.contour(x, y, padded, levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.7)
    line.set(path_effects=[_HALO])


def _crop(foreground: np.ndarray, spacing: Sequence[float]) -> tuple[slice, slice]:
    """The box of the foreground with a margin, at least a good part of the image; all of it without foreground."""
    if not foreground.any():
        return slice(None), slice(None)
    box = []
    bounds = [np.flatnonzero(foreground.any(axis=1 - axis)) for axis in (0, 1)]
    largest = max((b[-1] + 1 - b[0]) * s for b, s in zip(bounds, spacing, strict=True))
    for occupied, size, step in zip(bounds, foreground.shape, spacing, strict=True):
        wanted = max(largest * (1 + 2 * _MARGIN) / step, size * _SMALLEST)
        middle = (occupied[0] + occupied[-1] + 1) / 2
        start = int(max(0, min(middle - wanted / 2, size - wanted)))
        box.append(slice(start, int(min(size, np.ceil(start + wanted)))))
    return box[0], box[1]


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="black")
    return buffer.getvalue()
