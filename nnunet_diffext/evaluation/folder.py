"""Evaluation of a folder of predictions: `evaluate_predictions` is what ``nnunet_diffext evaluate`` runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes

from nnunet_diffext.data.parallel import Failure, PreprocessingError, run_all
from nnunet_diffext.evaluation import plots
from nnunet_diffext.evaluation.calibration import Calibration
from nnunet_diffext.evaluation.cases import POOLED, RENAMED, CaseScore, calibration_metrics, score_case
from nnunet_diffext.evaluation.metrics import METRICS, implementation
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.evaluation.report import metrics_csv, write_json, write_result
from nnunet_diffext.evaluation.task import OUTPUTS, Case, Options, Task, find_cases, find_dataset_json, load_task

SUMMARY, TABLE, RELIABILITY, RISK_COVERAGE = OUTPUTS
COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")


@dataclass
class Evaluation:
    """What `evaluate_predictions` did.

    Attributes:
        report: content of summary_diffext.json.
        files: what was written.
        missing: cases with a reference but no prediction.
        failed: case -> why it, or its probabilities, could not be evaluated.
        notes: case -> what is no error but should be known.
    """

    report: dict[str, Any]
    files: list[Path]
    missing: list[str]
    failed: dict[str, str]
    notes: dict[str, tuple[str, ...]]

    def problems(self) -> list[str]:
        """Lines for the end of the output; empty if all went well."""
        lines = [f"{case}: {why}" for case, why in self.failed.items()]
        if self.missing:
            lines.append(f"{len(self.missing)} reference(s) without prediction: {' '.join(self.missing)}")
        return lines

    def remarks(self) -> list[str]:
        """Lines about what is no error but should be known."""
        cases_of: dict[str, list[str]] = {}
        for case, notes in self.notes.items():
            for note in notes:
                cases_of.setdefault(note, []).append(case)
        lines = [f"{', '.join(cases)}: {note}" for note, cases in cases_of.items()]
        partly = self.report["not_annotated"]
        if partly:
            names = sorted({name for case in partly.values() for name in case})
            lines.append(f"{len(partly)} case(s) are without scores of labels not annotated there: {', '.join(names)}")
        unnamed = self.report["without_modality"]
        if unnamed:
            lines.append(
                f"{len(unnamed)} case(s) are scored on every label, since dataset.json beside the predictions names no "
                f"modality for them, and so not what was annotated: {', '.join(unnamed[:5])}"
            )
        if "calibration" not in self.report:
            lines.append("no probabilities, no calibration: predict with --save_probabilities to have it measured")
        without = self.report.get("calibration", {}).get("cases_without_probabilities", [])
        if without:
            lines.append(f"calibration is without {len(without)} case(s) that lack probabilities: {' '.join(without)}")
        return lines


def evaluate_predictions(
    pred_dir: str | Path,
    gt_dir: str | Path,
    *,
    dataset_json: str | Path | None = None,
    plans: str | Path | None = None,
    out: str | Path | None = None,
    options: Options | None = None,
    num_processes: int | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Score predictions, and their probabilities where there are ``CASE.npz`` beside them, and write the results.

    A case that cannot be evaluated does not stop the others. ``summary.json`` of nnU-Net is never touched.

    Args:
        pred_dir: segmentations, as nnU-Net writes them.
        gt_dir: references of the same names.
        dataset_json: default: see `find_dataset_json`.
        plans: default: plans.json beside dataset.json, if there is one.
        out: folder for the results; default: ``pred_dir``.
        options: tolerance, band and bins.
        num_processes: default: ``nnUNet_def_n_proc``, or 8.
        show_progress: show a progress bar.

    Raises:
        FileNotFoundError: a folder, every prediction or dataset.json is missing.
        ValueError: dataset.json cannot be used, or not one case could be evaluated; nothing is written then.
    """
    pred_dir, gt_dir = Path(pred_dir), Path(gt_dir)
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"the number of processes (-np) must be at least 1, got {num_processes}")
    options, out = options or Options(), Path(out or pred_dir)
    dataset_json = Path(dataset_json) if dataset_json else find_dataset_json(pred_dir)
    if plans is None and (dataset_json.parent / "plans.json").is_file():
        plans = dataset_json.parent / "plans.json"
    task = load_task(dataset_json, Path(plans) if plans else None)
    cases, missing = find_cases(pred_dir, gt_dir, task)
    scored = _Scores()
    jobs = [(case, task, options) for case in cases]
    try:
        for index, result in run_all(
            score_case, jobs, num_processes or default_num_processes, "evaluating", show_progress
        ):
            scored.add(cases[index].name, result)
    except PreprocessingError as error:
        raise ValueError(
            "a worker process died, most likely for lack of memory: evaluate again with fewer processes (-np)"
        ) from error
    if not scored.scores:
        reasons = "\n".join(f"{case}: {why}" for case, why in sorted(scored.failed.items()))
        raise ValueError(f"none of the {len(cases)} case(s) could be evaluated, nothing was written:\n{reasons}")
    report = _report(cases, task, options, scored)
    report |= {"failed": dict(sorted(scored.failed.items())), "missing": missing, "provenance": provenance()}
    files = _write(out, report, task, scored.pooled)
    return Evaluation(report, files, missing, report["failed"], dict(sorted(scored.notes.items())))


@dataclass
class _Scores:
    """Results as they arrive; the statistics of the cases are summed at once, because they are large."""

    scores: dict[str, CaseScore] = field(default_factory=dict)
    pooled: dict[str, tuple[Calibration, Calibration]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, name: str, result: CaseScore | Failure) -> None:
        """One case: its scores and notes, or why it has none."""
        if isinstance(result, Failure):
            self.failed[name] = result.message
            return
        for key, pair in result.statistics.items():
            before = self.pooled.get(key)
            self.pooled[key] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])
        self.scores[name] = CaseScore(result.metrics, result.calibration)
        if result.problem:
            self.failed[name] = f"segmentation evaluated, probabilities not: {result.problem}"
        if result.notes:
            self.notes[name] = result.notes


def _report(cases: Sequence[Case], task: Task, options: Options, scored: _Scores) -> dict[str, Any]:
    """Layout of nnU-Net's summary.json, plus calibration, counts and how the numbers were made."""
    rows = []
    blank = dict.fromkeys(calibration_metrics(Calibration.empty(), Calibration.empty()), math.nan)
    without = []
    for case in cases:
        if case.name not in scored.scores:
            continue
        score = scored.scores[case.name]
        row: dict[str, Any] = {"case": case.name, "metrics": score.metrics}
        row |= {"reference_file": str(case.reference), "prediction_file": str(case.prediction)}
        if scored.pooled and not score.calibration:
            without.append(case.name)
            row["metrics"] = {key: values | blank for key, values in score.metrics.items()}
        if scored.pooled:
            row["calibration"] = score.calibration or blank
        rows.append(row)
    mean = {key: mean_of(row["metrics"][key] for row in rows) for key in task.labels}
    report = {
        "metric_per_case": rows,
        "mean": mean,
        "foreground_mean": mean_of(mean.values()),
        "counts": {key: _counts([row["metrics"][key] for row in rows]) for key in task.labels},
        "labels": dict(task.names),
        "not_annotated": {
            case.name: [task.names[key] for key in case.unannotated]
            for case in cases
            if case.unannotated and case.name in scored.scores
        },
        "without_modality": [
            case.name for case in cases if any(task.unannotated.values()) and case.name not in task.unannotated
        ],
        "implementation": implementation(options.nsd_tolerance),
        "options": options.as_dict() | {"ignore_label": task.ignore_label, "regions": task.regions},
    }
    if scored.pooled:
        report["calibration"] = {
            "cases": len(rows) - len(without),
            "cases_without_probabilities": without,
            "mean": mean_of(row["calibration"] for row in rows),
            "pooled": {key: calibration_metrics(*pair) for key, pair in scored.pooled.items()},
            "reliability": {key: _table(pair) for key, pair in scored.pooled.items()},
        }
    return report


def by_name(report: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of `nnunet_diffext.evaluation.metrics` in a report of `evaluate_predictions`, by their names there.

    Returns:
        ``{"cases": {case: {label name: metrics}}, "mean": {label name: means and counts}, "implementation": str}``.
    """

    def named(values: Mapping[str, float]) -> dict[str, float]:
        return {name: values[RENAMED.get(name, name)] for name in METRICS}

    labels = report["labels"]
    return {
        "cases": {
            row["case"]: {name: named(row["metrics"][key]) for key, name in labels.items()}
            for row in report["metric_per_case"]
        },
        "mean": {name: named(report["mean"][key]) | report["counts"][key] for key, name in labels.items()},
        "implementation": report["implementation"],
    }


def mean_of(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean per metric over the rows in which it is defined; NaN if there is none."""
    rows = list(rows)
    result = {}
    for name in rows[0]:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        result[name] = float(np.mean(known)) if known else math.nan
    return result


def _counts(rows: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many cases each mean leaves out, by the empty-mask policy."""
    both_empty = sum(row["n_pred"] == row["n_ref"] == 0 for row in rows)
    reference_empty = sum(row["n_ref"] == 0 for row in rows)
    surface_undefined = sum((row["n_pred"] == 0) != (row["n_ref"] == 0) for row in rows)  # not of NaN and NaN
    return {
        "cases": sum(not math.isnan(row["n_ref"]) for row in rows),
        "both_empty": both_empty,
        "surface_undefined": surface_undefined,
        "reference_empty": reference_empty,
    }


def _table(pair: tuple[Calibration, Calibration]) -> dict[str, dict[str, list[float]]]:
    names = ("confidence", "outcome", "count")
    return {
        part: {name: column.tolist() for name, column in zip(names, statistics.reliability(), strict=True)}
        for part, statistics in zip(("image", "band"), pair, strict=True)
    }


def _write(
    out: Path, report: dict[str, Any], task: Task, pooled: Mapping[str, tuple[Calibration, Calibration]]
) -> list[Path]:
    contents: dict[str, bytes | str] = {TABLE: metrics_csv(report["metric_per_case"], task.names)}
    if pooled:
        titles = {POOLED: "all regions" if task.regions else "predicted class"} | dict(task.names)
        band = report["options"]["band_mm"]
        contents[RELIABILITY] = plots.reliability_png(pooled, titles, band)
        contents[RISK_COVERAGE] = plots.risk_coverage_png(pooled, titles, band)
    for name, content in contents.items():
        write_result(out / name, content)
    write_json(out / SUMMARY, report)
    return [out / name for name in (SUMMARY, *contents)]


def table(report: Mapping[str, Any]) -> str:
    """Means for the terminal: one line per label, then the calibration of all cases together."""
    columns = [name for name in next(iter(report["mean"].values())) if name not in COUNTS and "_band" not in name]
    columns = [name for name in columns if name not in ("ace", "mce", "aurc", "eaurc")]
    lines = [["label", *columns]]
    for key, values in report["mean"].items():
        lines.append([f"{key} {report['labels'][key]}", *(f"{values[name]:.4g}" for name in columns)])
    lines.append(["mean of labels", *(f"{report['foreground_mean'][name]:.4g}" for name in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if "calibration" in report:
        for title, values in (
            ("mean over cases", report["calibration"]["mean"]),
            ("all voxels pooled", report["calibration"]["pooled"][POOLED]),
        ):
            shown = (f"{name} {values[name]:.4g}" for name in ("nll", "brier", "ece", "ece_band", "aurc", "aurc_band"))
            text.append(f"calibration, {title}: {', '.join(shown)}")
    return "\n".join(text)
