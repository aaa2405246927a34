"""Curves of the trainings, one small chart per quantity with all models and folds in it, as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nnunet_diffext.report.model import Fold, ReportedModel
from nnunet_diffext.report.style import COLOURS

MAX_CLASSES = 16
_PART = "train_"
_LEGEND_ENTRIES = 12
_TOGETHER = (
    (
        "Loss: training solid, validation dashed",
        "loss",
        (("train_losses", "solid", True), ("val_losses", "dashed", False)),
    ),
    (
        "Pseudo Dice, mean of classes: each epoch thin, moving average bold",
        "Dice",
        (("mean_fg_dice", "solid", False), ("ema_fg_dice", "solid", True)),
    ),
)
"""Title, unit, and key, style and emphasis of what is drawn in one chart; the emphasised line is in the legend."""


@dataclass(frozen=True)
class Chart:
    """A picture and what to say about it."""

    title: str
    svg: bytes
    alt: str


@dataclass(frozen=True)
class _Line:
    label: str
    values: np.ndarray
    colour: str
    style: str = "solid"
    width: float = 1.4


def training_charts(models: Sequence[ReportedModel]) -> tuple[list[Chart], list[str]]:
    """Charts of all that was logged, and names of the losses that were 0 throughout.

    Args:
        models: their folds' ``logging``; what is missing or malformed there is left out.
    """
    runs = [(model, index, fold) for model in models for index, fold in enumerate(model.folds) if fold.logging]
    several = len(models) > 1
    styles = [
        (_label(m, f, several), colour_of(m.letter) if several else COLOURS[i % len(COLOURS)], f) for m, i, f in runs
    ]
    charts, zero = [], []
    for title, unit, keys in _TOGETHER:
        lines = [
            _Line(label if bold else "", series(fold.logging.get(key)), colour, style, 1.6 if bold else 0.8)
            for label, colour, fold in styles
            for key, style, bold in keys
        ]
        charts += _chart(title, unit, lines)
    logged = dict.fromkeys(key for _, _, fold in styles for key in fold.logging if str(key).startswith(_PART))
    for key in (k for k in logged if k != "train_losses"):
        name = str(key).removeprefix(_PART)
        lines = [_Line(label, series(f.logging.get(key)), colour) for label, colour, f in styles]
        known = [line for line in lines if np.isfinite(line.values).any()]
        if known and all(np.nanmax(np.abs(line.values)) == 0 for line in known):
            zero.append(name)
        else:
            charts += _chart(f"Part of the training loss: {name}", "loss", lines)
    for title, lines in _per_class(models, styles):
        charts += _chart(title, "Dice", lines)
    charts += _chart("Learning rate", "", [_Line(lb, series(f.logging.get("lrs")), c) for lb, c, f in styles])
    charts += _chart("Time per epoch", "seconds", [_Line(lb, epoch_seconds(f.logging), c) for lb, c, f in styles])
    return charts, zero


def series(values: Any) -> np.ndarray:
    """One number per epoch, ``(epochs,)``; NaN for what is no number, empty if there is no list."""
    if not isinstance(values, (list, tuple)):
        return np.zeros(0)
    return np.array([float(v) if np.isscalar(v) and not isinstance(v, (str, bytes)) else np.nan for v in values])


def epoch_seconds(logging: Mapping[str, Any]) -> np.ndarray:
    """Duration of every epoch in seconds, ``(epochs,)``."""
    start, end = (series(logging.get(f"epoch_{part}_timestamps")) for part in ("start", "end"))
    length = min(start.size, end.size)
    return end[:length] - start[:length]


def colour_of(letter: str) -> str:
    """Colour of a model, by its short name."""
    return COLOURS[(ord(letter) - ord("A") if letter.isalpha() else int(letter) - 1) % len(COLOURS)]


def _label(model: ReportedModel, fold: Fold, several: bool) -> str:
    return f"{model.letter}, fold {fold.name}" if several else f"fold {fold.name}"


def _per_class(
    models: Sequence[ReportedModel], styles: Sequence[tuple[str, str, Fold]]
) -> Iterator[tuple[str, list[_Line]]]:
    """Pseudo Dice of every class, where there is more than one."""
    names = list(models[0].task.names.values())
    if len(names) < 2:
        return
    for index, name in enumerate(names[:MAX_CLASSES]):
        lines = []
        for label, colour, fold in styles:
            epochs = fold.logging.get("dice_per_class_or_region")
            rows = epochs if isinstance(epochs, (list, tuple)) else []
            values = [row[index] if isinstance(row, (list, tuple)) and index < len(row) else None for row in rows]
            lines.append(_Line(label, series(values), colour, width=1.0))
        yield f"Pseudo Dice: {name}", lines


def _chart(title: str, unit: str, lines: Sequence[_Line]) -> list[Chart]:
    """One chart, or none if there is nothing to draw."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return []
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axis = figure.subplots()
    for line in lines:
        marker = "o" if line.values.size == 1 else None
        # The legend leaves out what begins with an underscore.
        axis.plot(
            np.arange(1, line.values.size + 1), line.values, color=line.colour, linestyle=line.style,
            linewidth=line.width, marker=marker, markersize=3, label=line.label or "_",
        )  # fmt: skip
    axis.set_xlabel("epoch")
    axis.set_ylabel(unit)
    axis.margins(x=0.01)
    axis.grid(color="#e3e6ea", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if unit == "Dice":
        axis.set_ylim(-0.02, 1.02)
    if unit == "seconds":
        axis.set_ylim(bottom=0)
    if 1 < sum(bool(line.label) for line in lines) <= _LEGEND_ENTRIES:
        axis.legend(fontsize=7, frameon=False)
    ends = [
        f"{line.label or 'the other line'}: {_first(line.values):.3g} to {_last(line.values):.3g}" for line in lines[:6]
    ]
    epochs = max(line.values.size for line in lines)
    return [Chart(title, to_svg(figure), f"{title} over {epochs} epoch(s). First to last value, {'; '.join(ends)}.")]


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG that is the same in every run and names no outside file."""
    FigureCanvasSVG(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "nnunet_diffext", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _first(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][0])


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])
