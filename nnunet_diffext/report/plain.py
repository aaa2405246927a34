"""The box on top, for clinicians: how good, how sure, where it fails. Measured facts only, without jargon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from nnunet_diffext.evaluation.cases import POOLED
from nnunet_diffext.report.confidence import Expected
from nnunet_diffext.report.exposure import HELD_OUT, TRAINED
from nnunet_diffext.report.markup import Content, Markup, counted, element, join, missing, paragraph, unordered
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.report.overview import model_title
from nnunet_diffext.report.results import values_of
from nnunet_diffext.report.scores import Scores
from nnunet_diffext.report.selection import best_and_worst, mean_dice

FEW_CASES, ENOUGH_FOR_AN_INTERVAL = 20, 6
_LISTED = 6
_AS_SURE_AS_RIGHT = 0.02


def plain_section(
    models: Sequence[ReportedModel],
    names: Sequence[str],
    scores: Sequence[Scores],
    expected: Sequence[Expected],
    comparison: dict[str, Any] | str | None,
) -> Markup:
    """The box. Arguments as in the other sections."""
    parts: list[Content] = [paragraph("Overlap is counted from 0 (none) to 100 (the same outline as the reference).")]
    for model, name, score, pairs in zip(models, names, scores, expected, strict=True):
        parts.append(model_title(model, name, len(models) > 1))
        if not score.rows:
            parts.append(missing("There are no scored predictions, so nothing can be said about this model."))
            continue
        parts += [
            _basis(score),
            element("h4", "How good"), _how_good(score),
            element("h4", "How sure"), _how_sure(score, pairs),
            element("h4", "Where it fails"), _where_it_fails(score),
        ]  # fmt: skip
    if isinstance(comparison, dict):
        parts += [element("h3", "Which model is better"), unordered(_which_is_better(comparison))]
    parts += [element("h4", "What this page cannot say"), unordered(_limits(scores))]
    return element(
        "section", element("h2", "In plain words", id="plain-title"), *parts, id="plain", class_="plain",
        aria_labelledby="plain-title",
    )  # fmt: skip


def _basis(scores: Scores) -> Markup:
    n, exposure = len(scores.rows), scores.exposure
    if exposure.status == HELD_OUT:
        return paragraph(f"Measured on {counted(n, 'validation case')} the model was not trained on.")
    if exposure.status == TRAINED:
        return paragraph(
            f"Caution: measured on {counted(n)}, and the model was trained on some or all of them. {exposure.why} "
            "These numbers do not show how it does on new cases.",
            class_="warning",
        )
    return paragraph(
        f"Measured on {counted(n)}. It is not known whether the model was trained on them. {exposure.why}",
        class_="warning",
    )


def _how_good(scores: Scores) -> Markup:
    overlaps = np.array([mean_dice(row) for row in scores.rows])
    overlaps = overlaps[np.isfinite(overlaps)]
    if not overlaps.size:
        return missing("Overlap is not defined in any case: neither reference nor prediction holds a structure.")
    headline = paragraph(
        element("span", f"{100 * overlaps.mean():.0f}", class_="big"),
        element(
            "span",
            f"of 100: average overlap with the reference. Single cases reach from {100 * overlaps.min():.0f} to "
            f"{100 * overlaps.max():.0f}.{_interval(overlaps)}",
        ),
        class_="headline",
    )
    items: list[Content] = []
    by_label = {key: values_of(scores, key, "Dice") for key in scores.labels}
    known = sorted((values.mean(), key) for key, values in by_label.items() if values.size)
    for mean, key in known[:_LISTED]:
        distance = values_of(scores, key, "ASD")
        text = f"{scores.labels[key]}: {100 * mean:.0f} of 100"
        if distance.size:
            text += f"; the outlines lie {distance.mean():.1f} mm apart on average, in cases that have both"
        items.append(text + ".")
    if len(known) > _LISTED:
        items.append(f"These are the {_LISTED} hardest of {len(known)} structures; all are in the table below.")
    return join(headline, unordered(items))


def _interval(values: np.ndarray) -> str:
    """Where the mean of more cases like these may lie; nothing for few cases."""
    if values.size < ENOUGH_FOR_AN_INTERVAL or np.ptp(values) == 0:
        return ""
    result = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = (f"{100 * float(v):.0f}" for v in result.confidence_interval)
    where = f"stay near {low}" if low == high else f"settle anywhere from {low} to {high}"
    return f" With more cases of the same kind, the average could well {where}."


def _how_sure(scores: Scores, pairs: Expected) -> Markup:
    items: list[Content] = []
    near = [s.summary["calibration"] for s in scores.sources if "calibration" in s.summary]
    sure, right = _confidence_and_accuracy(near)
    if math.isfinite(sure):
        gap = sure - right
        verdict = "about as sure as it should be"
        if abs(gap) > _AS_SURE_AS_RIGHT:
            verdict = "too sure of itself" if gap > 0 else "more cautious than it needs to be"
        items.append(
            f"In and around the structures it was {100 * sure:.0f} % sure on average, and right at "
            f"{100 * right:.0f} of 100 points: {verdict} there."
        )
    if pairs:
        guess, truth = (np.mean([p[i] for p in pairs.values()]) for i in (0, 1))
        items.append(
            f"Without seeing the reference it expected an overlap of {100 * guess:.0f}, and reached {100 * truth:.0f}, "
            f"on average over {counted(len(pairs))}."
        )
    if not items:
        return missing("Not measured: the predictions were stored without how sure the model was.")
    return unordered(items)


def _confidence_and_accuracy(calibrations: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean confidence and accuracy of the decision in the band around the structures; NaN if not known."""
    total = np.zeros(3)
    for content in calibrations:
        try:
            table = content["reliability"][POOLED]["band"]
            columns = [table[name] for name in ("confidence", "outcome", "count")]
        except (KeyError, TypeError):
            continue
        confidence, outcome, count = (np.array([v or 0.0 for v in column], dtype=np.float64) for column in columns)
        total += (confidence * count).sum(), (outcome * count).sum(), count.sum()
    return (total[0] / total[2], total[1] / total[2]) if total[2] else (math.nan, math.nan)


def _where_it_fails(scores: Scores) -> Markup:
    items: list[Content] = []
    _, worst = best_and_worst(scores.rows, 3)
    if worst:
        listed = ", ".join(f"{row['case']} ({100 * mean_dice(row):.0f})" for row in worst)
        items.append(f"Lowest overlap: {listed}.")
    for key, name in scores.labels.items():
        counts = scores.counts[key]
        if counts["missed"]:
            items.append(f"{name}: missed entirely in {counts['missed']} of {counted(counts['cases'])}.")
        if counts["invented"]:
            items.append(f"{name}: drawn in {counted(counts['invented'])} where the reference has none.")
    sizes = [(key, values_of(scores, key, "volume_error")) for key in scores.labels]
    for key, values in sorted((s for s in sizes if s[1].size), key=lambda s: -abs(s[1].mean()))[:_LISTED]:
        items.append(f"{scores.labels[key]}: {_size(values)}.")
    return unordered(items) if items else missing("Nothing to report.")


def _size(values: np.ndarray) -> str:
    def words(value: float) -> str:
        return f"{abs(value):.0f} % too {'large' if value > 0 else 'small'}" if abs(value) >= 0.5 else "the right size"

    if values.size == 1:
        return f"drawn {words(values[0])} in the one case where that is known"
    return f"drawn {words(values.mean())} on average, single cases from {words(values.min())} to {words(values.max())}"


def _which_is_better(comparison: Mapping[str, Any]) -> list[Content]:
    """Verdicts on the overlap alone, one per structure and pair of models."""
    items: list[Content] = []
    for row in comparison["comparisons"]:
        if row["metric"] != "Dice":
            continue
        label = comparison["labels"].get(row["label"], row["label"])
        points = 100 * row["difference"]
        where = f"{label}, {counted(row['n'])}"
        if math.isnan(row["wilcoxon_p_holm"]):
            items.append(f"{where}: too few to tell {row['first']} and {row['second']} apart.")
        elif row["better"] is None:
            items.append(
                f"{where}: no reliable difference in overlap between {row['first']} and {row['second']} (average "
                f"difference {abs(points):.1f} points). That does not prove that they are equal."
            )
        else:
            items.append(
                f"{where}: {row['better']} overlaps better in more cases than chance explains (average difference "
                f"{abs(points):.1f} points)."
            )
    return items or [missing("Overlap could not be compared.")]


def _limits(scores: Sequence[Scores]) -> list[Content]:
    smallest = min((len(s.rows) for s in scores if s.rows), default=0)
    items: list[Content] = []
    if 0 < smallest < FEW_CASES:
        items.append(f"Only {counted(smallest)} were looked at: rare failures may not be among them.")
    items += [
        "All cases come from one dataset. Other hospitals, scanners, protocols and patients were not tested.",
        "The reference is itself somebody's drawing; two experts would not agree completely either.",
        "Of several models or settings that were tried on the same cases, the best one looks better than it is.",
        "The numbers describe research results. They are no approval for use in patient care.",
    ]
    return items
