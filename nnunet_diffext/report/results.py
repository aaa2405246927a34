"""Table of metrics per class, and the paired comparison of several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_diffext.evaluation import compare
from nnunet_diffext.report.markup import Content, Markup, counted, element, join, missing, paragraph, section, table
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.report.overview import badge, model_title
from nnunet_diffext.report.scores import Scores

METRICS = {
    "Dice": "Dice",
    "NSD": "NSD",
    "HD95": "HD95, mm",
    "ASD": "ASD, mm",
    "volume_error": "Volume error, %",
}
_SCALE = {"volume_error": 100.0}
_COUNTS = {"cases": "Cases", "both_empty": "Both empty", "surface_undefined": "Surface undefined"}
_NAMES = {compare.ABSOLUTE_VOLUME_ERROR: "Size of the volume error, as a share"}
COMPARED = ("Dice", "NSD", "HD95", "ASD", compare.ABSOLUTE_VOLUME_ERROR)


def results_section(
    models: Sequence[ReportedModel],
    names: Sequence[str],
    scores: Sequence[Scores],
    comparison: dict[str, Any] | str | None,
) -> Markup:
    """Metrics per class of one model, or side by side.

    Args:
        models: their order is that of the columns.
        names: of the models.
        scores: one per model.
        comparison: result of `compare_scores`, or why there is none; ``None`` for a single model.
    """
    parts: list[Content] = []
    for model, name, score in zip(models, names, scores, strict=True):
        if score.problems:
            parts += [model_title(model, name, len(models) > 1), *map(missing, score.problems)]
    scored = [(m, s) for m, s in zip(models, scores, strict=True) if s.rows]
    if not scored:
        return section("results", "Results per structure", *parts, missing("No prediction could be scored."))
    parts.append(_by_class(scored[0][1]) if len(models) == 1 else _side_by_side(scored))
    parts += [_overall(scored), _legend(scored)]
    if comparison is not None:
        parts += [element("h3", "Paired comparison"), comparison_html(comparison)]
    return section("results", "Results per structure", *parts)


def compare_scores(models: Sequence[ReportedModel], scores: Sequence[Scores]) -> dict[str, Any] | str | None:
    """Paired comparison on the cases that all models have; a sentence if there can be none, ``None`` for one model."""
    if len(models) < 2:
        return None
    files = {m.letter: s.file for m, s in zip(models, scores, strict=True) if s.file is not None}
    if len(files) < 2:
        return "Fewer than two models have scored predictions: there is nothing to compare."
    try:
        loaded = compare.load_models(list(files.values()))
        # Messages name models by their files, and these are temporary.
        renamed = [replace(m, name=letter, file=Path(letter)) for m, letter in zip(loaded, files, strict=True)]
        known = [m for m in COMPARED if all(_has(s, m) for s in scores if s.file is not None)]
        return compare.compare_models(renamed, metrics=known, common_cases=True)
    except ValueError as error:
        return f"The models cannot be compared: {error}"


def comparison_html(comparison: dict[str, Any] | str) -> Markup:
    """Differences with their intervals and corrected p-values."""
    if isinstance(comparison, str):
        return missing(comparison)
    rows: list[tuple[Content, ...]] = []
    notes: dict[str, None] = {}
    group = None
    for row in comparison["comparisons"]:
        label = comparison["labels"].get(row["label"], row["label"])
        if label != group:
            rows.append((label,))
            group = label
        direction = "higher is better" if row["higher_is_better"] else "lower is better"
        interval = f"{number(row['ci_low'], '+.3f')} to {number(row['ci_high'], '+.3f')}"
        rows.append(
            (
                join(_NAMES.get(row["metric"], row["metric"]), element("span", direction, class_="range")),
                f"{row['second']} minus {row['first']}",
                str(row["n"]),
                number(row["difference"], "+.3f"),
                interval,
                number(row["wilcoxon_p_holm"], ".3g"),
                number(row["permutation_p_holm"], ".3g"),
                row["better"] or "not shown",
            )
        )
        if row["note"]:
            notes[f"{label}, {row['metric']}: {row['note']}"] = None
    header = ("Metric", "Models", "Cases", "Mean difference", "95 % interval", "Wilcoxon p (Holm)")
    left_out = {name: cases for name, cases in comparison["cases_left_out"].items() if cases}
    return join(
        table("Differences between models on the same cases", (*header, "Permutation p (Holm)", "Better"), rows),
        *(missing(f"Left out, as not every model has them: {counted(len(c))} of {n}.") for n, c in left_out.items()),
        *map(missing, notes),
        paragraph(comparison["method"], ".", class_="soft"),
    )


def number(value: float | None, form: str) -> str:
    """Formatted, or a dash where it is not defined."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def values_of(scores: Scores, label: str, metric: str) -> np.ndarray:
    """Defined values over the cases, ``(n,)``, in the unit of `METRICS`."""
    values = np.array([row["metrics"][label].get(metric, math.nan) for row in scores.rows], dtype=np.float64)
    return values[np.isfinite(values)] * _SCALE.get(metric, 1.0)


def _has(scores: Scores, metric: str) -> bool:
    name = "volume_error" if metric == compare.ABSOLUTE_VOLUME_ERROR else metric
    return any(values_of(scores, label, name).size for label in scores.labels)


def _cell(scores: Scores, label: str, metric: str) -> Content:
    values = values_of(scores, label, metric)
    if not values.size:
        return "–"
    digits = 3 if metric in ("Dice", "NSD") else 1
    sign = "+" if metric == "volume_error" else ""
    spread = f" ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else ""
    reach = f"{values.min():{sign}.{digits}f} to {values.max():{sign}.{digits}f}"
    fewer = f", {values.size} cases" if values.size < len(scores.rows) else ""
    return join(f"{values.mean():{sign}.{digits}f}{spread}", element("span", reach + fewer, class_="range"))


def _by_class(scores: Scores) -> Markup:
    metrics = [m for m in METRICS if any(values_of(scores, label, m).size for label in scores.labels)]
    header = ("Structure", *(METRICS[m] for m in metrics), *_COUNTS.values())
    rows = [
        (name, *(_cell(scores, label, m) for m in metrics), *(str(scores.counts[label][c]) for c in _COUNTS))
        for label, name in scores.labels.items()
    ]
    return table("Mean ± standard deviation over cases; below it smallest to largest value", header, rows)


def _side_by_side(scored: Sequence[tuple[ReportedModel, Scores]]) -> Markup:
    rows: list[tuple[Content, ...]] = []
    labels = dict(item for _, s in scored for item in s.labels.items())
    for label, name in labels.items():
        rows.append((name,))
        for metric, title in METRICS.items():
            cells = [_cell(s, label, metric) if label in s.labels else "–" for _, s in scored]
            if any(cell != "–" for cell in cells):
                rows.append((title, *cells))
        for key, title in _COUNTS.items():
            rows.append((title, *(str(s.counts[label][key]) if label in s.labels else "–" for _, s in scored)))
    header = ("Structure and metric", *(badge(m) for m, _ in scored))
    return table("Mean ± standard deviation over cases; below it smallest to largest value", header, rows)


def _overall(scored: Sequence[tuple[ReportedModel, Scores]]) -> Markup:
    """Mean over structures, where there are several."""
    if all(len(s.labels) < 2 for _, s in scored):
        return Markup("")
    parts = []
    for model, scores in scored:
        means = [m["Dice"] for m in scores.mean.values() if not math.isnan(m["Dice"])]
        value = number(float(np.mean(means)) if means else math.nan, ".3f")
        parts.append(f"{model.letter}: {value}" if len(scored) > 1 else value)
    return paragraph("Mean Dice over structures: ", ", ".join(parts))


def _legend(scored: Sequence[tuple[ReportedModel, Scores]]) -> Markup:
    summary = scored[0][1].sources[0].summary
    return join(
        paragraph(
            "Both empty: neither reference nor prediction has the structure; such a case is left out of the means. "
            "Surface undefined: only one of them has it; Dice and NSD are 0, distances are left out. ",
            class_="soft",
        ),
        paragraph(str(summary["implementation"]), ".", class_="soft"),
    )
