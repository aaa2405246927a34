"""Scores of a model's predictions: those that ``evaluate`` left, or new ones. Model folders are not written to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_diffext.data.dataset import load_json, nnunet_folder
from nnunet_diffext.evaluation.folder import RELIABILITY, RISK_COVERAGE, SUMMARY, evaluate_predictions, mean_of
from nnunet_diffext.evaluation.report import write_json
from nnunet_diffext.evaluation.task import find_cases
from nnunet_diffext.report.exposure import UNKNOWN, Exposure, combine, prediction_exposure, validation_exposure
from nnunet_diffext.report.model import ReportedModel

_NEEDED = {"Dice", "n_pred", "n_ref", "volume_error"}
PICTURES = (RELIABILITY, RISK_COVERAGE)
_REFERENCES = (("nnUNet_preprocessed", "gt_segmentations"), ("nnUNet_raw", "labelsTs"), ("nnUNet_raw", "labelsTr"))


@dataclass(frozen=True)
class Source:
    """One folder of predictions.

    Attributes:
        title: ``fold 0``, or the name of the folder.
        folder: it.
        summary: content of summary_diffext.json, ``None`` replaced by NaN in the metrics.
        pictures: file name -> PNG; of `PICTURES`, where there are probabilities.
        exposure: whether its cases were trained on.
    """

    title: str
    folder: Path
    summary: Mapping[str, Any]
    pictures: Mapping[str, bytes]
    exposure: Exposure


@dataclass
class Scores:
    """All scored predictions of a model.

    Attributes:
        sources: the folders.
        rows: ``metric_per_case`` of all of them; ``source`` tells which.
        mean: label key -> metric -> mean over cases.
        counts: label key -> how many cases the means leave out.
        labels: label key -> name.
        file: the rows as a summary for `nnunet_diffext.evaluation.compare`.
        problems: what is missing, one line each.
    """

    sources: list[Source] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    mean: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def exposure(self) -> Exposure:
        """Of all cases together."""
        return combine([s.exposure for s in self.sources]) if self.sources else Exposure(UNKNOWN, "No case was scored.")


def score_model(
    model: ReportedModel,
    scratch: Path,
    *,
    gt: Path | None = None,
    pred: Path | None = None,
    num_processes: int | None = None,
    show_progress: bool = False,
) -> Scores:
    """Score the validation of every fold, or the predictions in ``pred``.

    Args:
        model: it.
        scratch: an empty folder for what is computed here.
        gt: references; default: see `reference_folder`.
        pred: predictions instead of those of the folds.
        num_processes: as in `evaluate_predictions`.
        show_progress: show a progress bar.

    Returns:
        Scores; whatever could not be scored is in ``problems``.
    """
    scores = Scores()
    folders = [(pred.name or str(pred), pred, None)] if pred else [
        (f"fold {fold.name}", fold.folder / "validation", fold.name) for fold in model.folds
    ]  # fmt: skip
    for index, (title, folder, fold) in enumerate(folders):
        if not folder.is_dir():
            scores.problems.append(
                f"No predictions of {title}: nnUNetv2_train writes {folder.name}/ at its end, or with --val."
            )
            continue
        try:
            references = gt or reference_folder(model, folder)
            summary, pictures = _scored(model, folder, references, scratch / str(index), num_processes, show_progress)
        except (OSError, ValueError) as error:
            scores.problems.append(f"The predictions of {title} could not be scored: {error}")
            continue
        cases = [row["case"] for row in summary["metric_per_case"]]
        exposure = prediction_exposure(model, cases) if fold is None else validation_exposure(model, fold, cases)
        scores.sources.append(Source(title, folder, summary, pictures, exposure))
        scores.problems += [f"{title}, {case}: {why}" for case, why in (summary.get("failed") or {}).items()]
    _merge(scores, scratch)
    return scores


def reference_folder(model: ReportedModel, predictions: Path) -> Path:
    """nnU-Net's own copy of the references, else ``labelsTs`` or ``labelsTr``: the first that holds a predicted case.

    Raises:
        FileNotFoundError: none does.
    """
    places = []
    for variable, name in _REFERENCES:
        try:
            places.append(nnunet_folder(variable) / model.dataset / name)
        except ValueError:
            continue  # the variable is not set
    for place in (p for p in places if p.is_dir()):
        cases, _ = find_cases(predictions, place, model.task)
        if any(case.reference.is_file() for case in cases):
            return place
    looked = ", ".join(map(str, places)) or "nnUNet_preprocessed and nnUNet_raw are not set"
    raise FileNotFoundError(f"no references of its cases ({looked}); name their folder with -gt")


def _scored(
    model: ReportedModel, folder: Path, gt: Path, scratch: Path, num_processes: int | None, show_progress: bool
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Summary and pictures, from the folder if they are newer than the predictions and fit to the references."""
    place = folder if _is_fresh(model, folder, gt) else scratch
    if place is scratch:
        evaluate_predictions(
            folder, gt, dataset_json=model.folder / "dataset.json", out=scratch, num_processes=num_processes,
            show_progress=show_progress,
        )  # fmt: skip
    summary = load_json(place / SUMMARY, "")
    for row in summary["metric_per_case"]:
        row["metrics"] = {key: _with_nan(values) for key, values in row["metrics"].items()}
    pictures = {name: (place / name).read_bytes() for name in PICTURES if (place / name).is_file()}
    return summary, pictures if "calibration" in summary else {}


def _is_fresh(model: ReportedModel, folder: Path, gt: Path) -> bool:
    file = folder / SUMMARY
    try:
        cases, _ = find_cases(folder, gt, model.task)
        inputs = [f for c in cases for f in (c.prediction, c.reference, c.probabilities) if f is not None]
        if file.stat().st_mtime < max(f.stat().st_mtime for f in inputs if f.is_file()):
            return False
        summary = load_json(file, "")
        rows = {row["case"]: Path(row["reference_file"]) for row in summary["metric_per_case"]}
        known = set(rows) | set(summary["failed"])
        same_labels = summary["labels"] == dict(model.task.names)
        scored = [{k: _with_nan(m) for k, m in row["metrics"].items()} for row in summary["metric_per_case"]]
        complete = all(set(s) == set(summary["labels"]) and all(set(m) >= _NEEDED for m in s.values()) for s in scored)
        return (
            bool(rows) and complete and same_labels and known == {c.name for c in cases}
            and {r.parent.resolve() for r in rows.values()} == {gt.resolve()}
            and "options" in summary and "implementation" in summary
        )  # fmt: skip
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return False  # missing, damaged or of another program: scored anew


def _with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _merge(scores: Scores, scratch: Path) -> None:
    """Rows of all sources in one table; a case that several folds predicted counts once."""
    if not scores.sources:
        return
    seen: dict[str, str] = {}
    for source in scores.sources:
        for row in source.summary["metric_per_case"]:
            case = row["case"]
            if case in seen:
                scores.problems.append(f"{case} was predicted by {seen[case]} and {source.title}; the first counts.")
                continue
            seen[case] = source.title
            scores.rows.append({**row, "source": source})
    scores.labels = dict(scores.sources[0].summary["labels"])
    for key in scores.labels:
        metrics = [row["metrics"][key] for row in scores.rows]
        shared = set.intersection(*(set(m) for m in metrics))
        scores.mean[key] = mean_of([{n: m[n] for n in metrics[0] if n in shared} for m in metrics])
        scores.counts[key] = {
            "cases": len(metrics),
            "both_empty": _count(metrics, lambda m: m["n_pred"] == m["n_ref"] == 0),
            "surface_undefined": _count(metrics, lambda m: (m["n_pred"] == 0) != (m["n_ref"] == 0)),
            "missed": _count(metrics, lambda m: m["n_pred"] == 0 < m["n_ref"]),
            "invented": _count(metrics, lambda m: m["n_ref"] == 0 < m["n_pred"]),
        }
    first = scores.sources[0].summary
    merged = {key: first[key] for key in ("labels", "implementation", "options")}
    merged["metric_per_case"] = [{k: v for k, v in row.items() if k != "source"} for row in scores.rows]
    scores.file = scratch / SUMMARY
    write_json(scores.file, merged)


def _count(rows: Sequence[Mapping[str, float]], condition: Callable[[Mapping[str, float]], bool]) -> int:
    return sum(map(condition, rows))
