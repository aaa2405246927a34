"""Calibration of the probabilities, and the quality that the model expected of itself against what it achieved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nnunet_diffext.evaluation.cases import POOLED
from nnunet_diffext.evaluation.folder import RELIABILITY
from nnunet_diffext.report.curves import colour_of, to_svg
from nnunet_diffext.report.markup import (
    Content,
    Markup,
    counted,
    element,
    figure,
    join,
    missing,
    paragraph,
    section,
    table,
)
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.report.overview import model_title
from nnunet_diffext.report.results import number
from nnunet_diffext.report.scores import PICTURES, Scores
from nnunet_diffext.report.selection import mean_dice, read_quality

FIGURES = {
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "ece_band": "ECE, band",
    "aurc": "AURC",
    "aurc_band": "AURC, band",
}
Expected = dict[str, tuple[float, float]]
"""Case -> expected and achieved mean Dice."""


def expected_and_achieved(scores: Scores) -> tuple[Expected, list[str]]:
    """What ``quality.csv`` promised against what was achieved, and why some of it is missing."""
    found: Expected = {}
    problems = []
    for source in scores.sources:
        try:
            quality = read_quality(source.folder)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        for row in scores.rows:
            achieved = mean_dice(row)
            if row["source"] is source and row["case"] in quality and np.isfinite(achieved):
                found[row["case"]] = quality[row["case"]], achieved
    return found, list(dict.fromkeys(problems))


def confidence_section(
    models: Sequence[ReportedModel], names: Sequence[str], scores: Sequence[Scores], expected: Sequence[Expected],
    problems: Sequence[Sequence[str]],
) -> Markup:  # fmt: skip
    """Reliability diagrams, risk-coverage curves and expected quality of all models."""
    parts: list[Content] = []
    for model, name, score in zip(models, names, scores, strict=True):
        parts += [model_title(model, name, len(models) > 1), _calibration(score)]
    parts.append(element("h3", "Expected against achieved Dice"))
    if any(expected):
        parts.append(_scatter(models, expected))
    for model, lines in zip(models, problems, strict=True):
        prefix = f"{model.letter}: " if len(models) > 1 else ""
        parts += [missing(prefix + line) for line in lines]
    if not any(expected) and not any(problems):
        parts.append(missing("No prediction could be scored."))
    return section("confidence", "How far the probabilities can be trusted", *parts)


def _calibration(scores: Scores) -> Markup:
    if not scores.sources:
        return missing("No prediction could be scored.")
    parts: list[Content] = []
    with_figures = [s for s in scores.sources if "calibration" in s.summary]
    without = [s.title for s in scores.sources if s not in with_figures]
    if with_figures:
        rows = [(s.title, *(number(_pooled(s.summary).get(f), ".4f") for f in FIGURES)) for s in with_figures]
        caption = "Calibration of the predicted class, all voxels of all cases pooled; lower is better"
        parts.append(table(caption, ("Predictions", *FIGURES.values()), rows))
    for source in with_figures:
        pictures = []
        for name in PICTURES:
            if name not in source.pictures:
                parts.append(missing(f"{name} of {source.title} is missing: evaluate the folder again."))
                continue
            title = "Reliability diagram" if name == RELIABILITY else "Risk-coverage curve"
            alt = _alt(title, source.summary)
            pictures.append(figure(source.pictures[name], "png", alt, f"{title}, {source.title}."))
        parts.append(element("div", *pictures, class_="large"))
    if without:
        parts.append(
            missing(
                f"No reliability diagram and risk-coverage curve of {', '.join(without)}: there are no probabilities "
                "(nnUNetv2_train --npz, or --save_probabilities when predicting)."
            )
        )
    return join(*parts)


def _pooled(summary: Mapping) -> Mapping:
    return summary["calibration"].get("pooled", {}).get(POOLED, {})


def _alt(title: str, summary: Mapping) -> str:
    figures = _pooled(summary)
    shown = ", ".join(f"{label} {number(figures.get(key), '.4f')}" for key, label in FIGURES.items())
    return f"{title} of the whole image and near the structures. In numbers: {shown}."


def _scatter(models: Sequence[ReportedModel], expected: Sequence[Expected]) -> Markup:
    picture = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = picture.subplots()
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="_")
    for model, pairs in zip(models, expected, strict=True):
        if pairs:
            x, y = np.array(list(pairs.values())).T
            axis.scatter(x, y, s=22, color=colour_of(model.letter), alpha=0.75, label=model.letter, linewidths=0)
    low = max(0.0, min(value for pairs in expected for pair in pairs.values() for value in pair) - 0.05)
    axis.set(xlim=(low, 1), ylim=(low, 1), xlabel="expected Dice", ylabel="achieved Dice", aspect="equal")
    axis.grid(color="#e3e6ea", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if sum(map(bool, expected)) > 1:
        axis.legend(fontsize=8, frameon=False)
    gaps = [
        f"{m.letter}: expected {np.mean([a for a, _ in p.values()]):.3f}, achieved "
        f"{np.mean([b for _, b in p.values()]):.3f} on average over {counted(len(p))}"
        for m, p in zip(models, expected, strict=True)
        if p
    ]
    text = "; ".join(gaps)
    caption = paragraph("One point per case; below the line a case is worse than the model believed. ", text, ".")
    alt = f"Expected against achieved mean Dice per case. {text}."
    return join(element("div", figure(to_svg(picture), "svg", alt), class_="charts"), caption)
