"""Best and worst cases with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_diffext.report.confidence import Expected
from nnunet_diffext.report.images import NoPictureError, load_case
from nnunet_diffext.report.markup import Content, Markup, element, figure, join, missing, paragraph, section
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.report.overview import model_title
from nnunet_diffext.report.pictures import PANELS, PREDICTION_COLOUR, REFERENCE_COLOUR, draw_case
from nnunet_diffext.report.results import number
from nnunet_diffext.report.scores import Scores
from nnunet_diffext.report.selection import best_and_worst, mean_dice


def gallery_section(
    models: Sequence[ReportedModel], names: Sequence[str], scores: Sequence[Scores], expected: Sequence[Expected],
    shown: int,
) -> Markup:  # fmt: skip
    """``shown`` worst and best cases of every model."""
    if not shown:
        return section("cases", "Best and worst cases", missing("Left out (--cases 0)."))
    parts: list[Content] = [
        paragraph(
            _swatch(REFERENCE_COLOUR, "solid"), "reference outline ", _swatch(PREDICTION_COLOUR, "dashed"),
            "predicted outline. Every case in the slice with most wrong voxels, so pictures look worse than the case "
            "as a whole. Uncertainty, where there is a map: black is sure, yellow is unsure.",
        )
    ]  # fmt: skip
    for model, name, score, pairs in zip(models, names, scores, expected, strict=True):
        parts.append(model_title(model, name, len(models) > 1))
        best, worst = best_and_worst(score.rows, shown)
        if not worst:
            parts.append(missing("No case has a Dice that is defined, so none is best or worst."))
            continue
        columns = [
            element("div", element("h4", title), *(_card(model, row, pairs) for row in rows))
            for title, rows in (("Worst cases", worst), ("Best cases", best))
            if rows
        ]
        parts.append(element("div", *columns, class_="cases"))
    return section("cases", "Best and worst cases", *parts)


def _swatch(colour: str, style: str) -> Markup:
    return element("span", class_="legend", style=f"border-color:{colour};border-top-style:{style}", aria_hidden="true")


def _card(model: ReportedModel, row: Mapping[str, Any], pairs: Expected) -> Markup:
    case, source = row["case"], row["source"]
    names = model.task.names
    dice = ", ".join(f"{names.get(k, k)} {number(m['Dice'], '.3f')}" for k, m in row["metrics"].items())
    caption: list[Content] = [element("strong", case), f", {source.title}. Dice {dice}."]
    if case in pairs:
        caption.append(f" Expected by the model {pairs[case][0]:.3f}, achieved {pairs[case][1]:.3f}.")
    try:
        images = load_case(model, row, source.folder)
        png, where = draw_case(images, model.task)
    except NoPictureError as error:
        return element("div", paragraph(*caption), missing(f"No picture: {error}."))
    except (MemoryError, ValueError, np.linalg.LinAlgError) as error:
        return element("div", paragraph(*caption), missing(f"No picture: it could not be drawn ({error})."))
    panels = PANELS if images.entropy is not None else PANELS[:2]
    if images.note:
        caption.append(f" {images.note}.")
    elif images.entropy is None:
        caption.append(" No uncertainty map (nnunet_diffext predict --uncertainty).")
    caption.insert(2, f" Shown: {where}.")
    alt = f"{case}: {', '.join(panels)} in {where}. Mean Dice of the case {mean_dice(row):.3f}."
    return figure(png, "png", alt, join(*caption), class_="photo")
