"""What was run: trainer, plans, folds, dates, versions, settings, temperature, citations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunet_diffext.report.curves import colour_of
from nnunet_diffext.report.markup import (
    Content,
    Markup,
    breakable,
    counted,
    element,
    join,
    missing,
    section,
    table,
    unordered,
)
from nnunet_diffext.report.model import ReportedModel
from nnunet_diffext.report.scores import Scores
from nnunet_diffext.report.settings_table import citation_of, settings_html

NNUNET = (
    "Isensee, F., Jaeger, P. F., Kohl, S. A. A., Petersen, J., Maier-Hein, K. H. (2021). nnU-Net: a self-configuring "
    "method for deep learning-based biomedical image segmentation. Nature Methods 18(2), 203-211."
)
_FIGURES = ("nll", "ece", "brier")


def badge(model: ReportedModel) -> Markup:
    """Letter of the model in its colour."""
    return element("span", model.letter, class_="badge", style=f"background:{colour_of(model.letter)}")


def model_title(model: ReportedModel, name: str, several: bool) -> Markup:
    """Heading of the model's part of a section; with a single model nothing needs telling apart."""
    return element("h3", badge(model), breakable(name)) if several else Markup("")


def overview_section(models: Sequence[ReportedModel], names: Sequence[str], scores: Sequence[Scores]) -> Markup:
    """Head of the page for people who know nnU-Net."""
    facts = [_facts(m, s) for m, s in zip(models, scores, strict=True)]
    keys = list(dict.fromkeys(key for f in facts for key in f))
    header = ["", *(join(badge(m), breakable(n)) for m, n in zip(models, names, strict=True))]
    rows = [(key, *(f.get(key, "not recorded") for f in facts)) for key in keys]
    parts: list[Content] = [table("Models on this page", header, rows, numeric=False)]
    for model, name in zip(models, names, strict=True):
        problems = (*model.problems, *(p for fold in model.folds for p in fold.problems))
        parts += [
            model_title(model, name, len(models) > 1),
            *map(missing, problems),
            element("h4", "Settings"),
            settings_html(model),
            element("h4", "Temperature of the probabilities"),
            _temperature(model.calibration),
        ]
    citations = dict.fromkeys([NNUNET, *filter(None, map(citation_of, models))])
    parts += [element("h3", "Please cite"), unordered(list(citations))]
    return section("run", "What was run", *parts)


def _facts(model: ReportedModel, scores: Scores) -> dict[str, Content]:
    planned, debug = model.planned, [fold.debug for fold in model.folds]
    facts: dict[str, Content] = {
        "Dataset": breakable(model.dataset),
        "Trainer": breakable(model.trainer),
        "Plans and configuration": breakable(f"{model.plans.get('plans_name', 'not recorded')}, {model.configuration}"),
        "Patch size": _by(planned.patch_size),
        "Batch size": str(planned.batch_size),
        "Spacing": f"{_by(planned.spacing)} mm",
        "Folds on this page": ", ".join(fold.name for fold in model.folds),
        "Structures": ", ".join(model.task.names.values()),
    }
    cases = [f"fold {fold.name}: {fold.facts['cases']}" for fold in model.folds if "cases" in fold.facts]
    trained = [
        f"fold {fold.name}: {fold.facts['started']} to {fold.facts['ended']}" + " (not finished)" * (not fold.finished)
        for fold in model.folds
        if "started" in fold.facts
    ]
    optional = {
        "Cases": _lines(cases),
        "Trained (local time)": _lines(trained),
        "Device": _distinct(d.get("gpu_name") or d.get("device") for d in debug),
        "PyTorch of the training": _distinct(d.get("torch_version") for d in debug),
        "Scored": _lines(f"{s.title}: {_scored_with(s.summary)}" for s in scores.sources),
    }
    return facts | {key: value for key, value in optional.items() if value}


def _scored_with(summary: Mapping[str, Any]) -> str:
    made = summary.get("provenance")
    made = made if isinstance(made, Mapping) else {}
    versions = made.get("versions") if isinstance(made.get("versions"), Mapping) else {}
    named = [f"{p} {versions[p]}" for p in ("nnunet_diffext", "nnunetv2", "monai") if p in versions]
    return ", ".join([str(made.get("date", "date not recorded")), *named])


def _temperature(content: Mapping[str, Any] | None) -> Markup:
    if content is None:
        return missing("None was fitted (nnunet_diffext calibrate): probabilities are as the network gave them.")
    try:
        cases, rows = len(content["cases"]), []
        for key, title in (
            ("before", "before"),
            ("after", "after, on the cases it was fitted on"),
            ("cross_validated", "after, fitted on the other half of the cases"),
        ):
            if content.get(key):
                rows.append((title, *(f"{float(content[key][figure]):.4f}" for figure in _FIGURES)))
        folds = ", ".join(map(str, content["settings"]["folds"]))
        caption = (
            f"Temperature {float(content['temperature']):.3f}, fitted on {counted(cases)} of fold {folds}, "
            f"{content['date']}; lower is better"
        )
        return table(caption, ("", "NLL", "ECE", "Brier"), rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return missing(f"calibration.json cannot be used ({type(error).__name__}: {error}).")


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _lines(values: Iterable[str]) -> Content:
    lines = [element("span", value, class_="range") for value in values]
    return join(*lines) if lines else None


def _distinct(values: Iterable[Any]) -> Content:
    return ", ".join(dict.fromkeys(str(value) for value in values if value)) or None
