"""The whole page: `write_report` is what ``nnunet_diffext report`` runs."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_diffext import __version__
from nnunet_diffext.evaluation.report import write_result
from nnunet_diffext.report.confidence import confidence_section, expected_and_achieved
from nnunet_diffext.report.curves import training_charts
from nnunet_diffext.report.gallery import gallery_section
from nnunet_diffext.report.markup import Content, Markup, element, figure, join, missing, paragraph, section, unordered
from nnunet_diffext.report.model import ReportedModel, display_names, load_models
from nnunet_diffext.report.overview import overview_section
from nnunet_diffext.report.plain import plain_section
from nnunet_diffext.report.results import compare_scores, results_section
from nnunet_diffext.report.scores import Scores, score_model
from nnunet_diffext.report.style import CSS, SCRIPT

CASES = 3
_SECTIONS = {
    "plain": "In plain words",
    "results": "Results per structure",
    "cases": "Best and worst cases",
    "confidence": "Trust in probabilities",
    "training": "Training",
    "run": "What was run",
}
# The browser itself refuses to load anything from elsewhere, whatever names and notes may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """What `write_report` did.

    Attributes:
        file: the page.
        problems: what is missing on it, one line each.
    """

    file: Path
    problems: list[str]


def write_report(
    model_folders: Sequence[str | Path],
    out: str | Path,
    *,
    folds: Sequence[str] | None = None,
    gt: str | Path | None = None,
    pred: Sequence[str | Path] | None = None,
    cases: int = CASES,
    num_processes: int | None = None,
    show_progress: bool = False,
) -> Report:
    """Write one HTML page about one or several model folders. Nothing is written but the page.

    Args:
        model_folders: of nnU-Net, ``TRAINER__PLANS__CONFIGURATION``.
        out: the page.
        folds: which folds; default: the numbered ones that are there, else ``all``.
        gt: references; default: those of nnUNet_preprocessed or nnUNet_raw.
        pred: one folder of predictions per model, instead of the validation of its folds.
        cases: how many best and worst cases are shown per model.
        num_processes: of the evaluation; default: ``nnUNet_def_n_proc``, or 8.
        show_progress: show progress bars.

    Raises:
        FileNotFoundError: a model folder, fold, prediction or reference folder is missing.
        ValueError: a model folder cannot be used, or arguments do not fit together; nothing is written then.
    """
    predictions = [Path(p) for p in pred] if pred else [None] * len(model_folders)
    _check(model_folders, Path(out), predictions, gt, cases, num_processes)
    models = load_models(model_folders, folds)
    with tempfile.TemporaryDirectory(prefix="nnunet_diffext_report_") as scratch:
        scores = [
            score_model(
                model, Path(scratch) / str(index), gt=Path(gt) if gt else None, pred=predictions[index],
                num_processes=num_processes, show_progress=show_progress,
            )
            for index, model in enumerate(models)
        ]  # fmt: skip
        page = render(models, scores, cases)
    write_result(Path(out), page)
    problems = [
        f"{m.letter}: {line}"
        for m, s in zip(models, scores, strict=True)
        for line in (*m.problems, *(p for fold in m.folds for p in fold.problems), *s.problems)
    ]
    return Report(Path(out), problems)


def render(models: Sequence[ReportedModel], scores: Sequence[Scores], cases: int = CASES) -> str:
    """The page as text. Arguments: as in `write_report`, one `Scores` per model."""
    names = display_names(models)
    comparison = compare_scores(models, scores)
    expected, reasons = zip(*map(expected_and_achieved, scores), strict=True)
    title = f"Segmentation report: {', '.join(dict.fromkeys(m.dataset for m in models))}"
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    links = [element("a", text, href=f"#{identifier}") for identifier, text in _SECTIONS.items()]
    body = join(
        element(
            "header",
            element("h1", title),
            paragraph(f"{', '.join(names)}. Made {made}.", class_="soft"),
            element("nav", unordered(links), aria_label="Sections"),
        ),
        element(
            "main",
            plain_section(models, names, scores, expected, comparison),
            results_section(models, names, scores, comparison),
            gallery_section(models, names, scores, expected, cases),
            confidence_section(models, names, scores, expected, reasons),
            _training_section(models),
            overview_section(models, names, scores),
        ),
        element(
            "footer",
            paragraph(
                f"nnunet_diffext {__version__}. Names of cases and pictures on this page may identify patients: share "
                "it as you would share the images.",
                class_="soft",
            ),
        ),
    )
    head = join(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(CSS)),
        element("script", Markup(SCRIPT)),
    )
    document = element("html", element("head", head), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _check(
    models: Sequence[str | Path],
    out: Path,
    predictions: Sequence[Path | None],
    gt: str | Path | None,
    cases: int,
    num_processes: int | None,
) -> None:
    if len(predictions) != len(models):
        raise ValueError(f"-pred needs one folder per model, in their order; got {len(predictions)} for {len(models)}")
    for folder, flag in (*((p, "-pred") for p in predictions), (gt, "-gt")):
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder} is no folder ({flag})")
    if cases < 0:
        raise ValueError(f"--cases must be 0 or more, got {cases}")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"the number of processes (-np) must be at least 1, got {num_processes}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; -o names the page, for example {out / 'report.html'}")


def _training_section(models: Sequence[ReportedModel]) -> Markup:
    charts, zero = training_charts(models)
    if not charts:
        return section("training", "Training", missing("No training curves: no checkpoint of these folds holds any."))
    parts: list[Content] = [
        element(
            "div",
            *(join(element("div", element("h4", c.title), figure(c.svg, "svg", c.alt))) for c in charts),
            class_="charts",
        )
    ]
    if zero:
        parts.append(missing(f"Zero throughout, and not drawn: {', '.join(zero)}."))
    parts.append(
        paragraph(
            "Pseudo Dice is nnU-Net's estimate on random patches of the validation cases; it is no result. nnU-Net's "
            "loss contains minus Dice, hence values below 0.",
            class_="soft",
        )
    )
    return section("training", "Training", *parts)
