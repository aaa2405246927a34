"""Comparison of models on the same cases: what ``nnunet_diffext evaluate --compare`` runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunet_diffext.data.dataset import load_json
from nnunet_diffext.evaluation.cases import POOLED
from nnunet_diffext.evaluation.paired import CONFIDENCE, MIN_PAIRS, RESAMPLES, holm, paired_statistics
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.evaluation.report import write_json
from nnunet_diffext.evaluation.task import OUTPUTS

ABSOLUTE_VOLUME_ERROR = "abs_volume_error"
_CALIBRATION = ("nll", "brier", "ece", "ace", "mce", "aurc", "eaurc")
HIGHER_IS_BETTER = {"Dice": True, "IoU": True, "NSD": True, "HD95": False, "ASD": False, ABSOLUTE_VOLUME_ERROR: False}
HIGHER_IS_BETTER |= {name + part: False for part in ("", "_band") for name in _CALIBRATION}
"""Metrics that can be compared, and their direction."""

DEFAULT_METRICS = ("Dice", "NSD", "HD95", "ASD", ABSOLUTE_VOLUME_ERROR, "nll", "brier", "ece_band", "aurc")
TESTS = ("wilcoxon_p", "permutation_p")
ALPHA = 0.05
COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Model:
    """One summary_diffext.json: case -> label key -> metric -> value."""

    name: str
    file: Path
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    report: Mapping[str, Any]


def load_models(paths: Sequence[str | Path]) -> list[Model]:
    """Read summaries; models are called after their folders, with as much of the path as tells them apart.

    Args:
        paths: folders with summary_diffext.json, or such files.

    Raises:
        FileNotFoundError: a summary is missing.
        ValueError: fewer than two, one of them twice, or a file is no such summary.
    """
    files = [Path(p) / OUTPUTS[0] if Path(p).is_dir() else Path(p) for p in paths]
    if len({f.resolve() for f in files}) < max(2, len(files)):
        raise ValueError("--compare needs at least two different folders or summary_diffext.json files")
    names = _short_names([f.resolve() for f in files])
    return [_load(name, file) for name, file in zip(names, files, strict=True)]


def compare_models(
    models: Sequence[Model], *, metrics: Sequence[str] | None = None, common_cases: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Compare every pair of models per label and metric.

    Args:
        models: at least two, scored on the same references with the same options.
        metrics: keys of `HIGHER_IS_BETTER`; default: those of `DEFAULT_METRICS` that all models have.
        common_cases: compare on the cases that all models have, instead of refusing where they differ.
        seed: of bootstrap and permutations.

    Returns:
        Content of comparison.json; ``comparisons`` has one row per label, metric and pair of models.

    Raises:
        ValueError: an unknown metric, or models that were not scored in the same way on the same cases.
    """
    wanted = tuple(dict.fromkeys(metrics or DEFAULT_METRICS))
    unknown = [m for m in wanted if m not in HIGHER_IS_BETTER]
    if unknown:
        raise ValueError(f"unknown metric(s) {', '.join(unknown)}; known: {', '.join(HIGHER_IS_BETTER)}")
    _check_same_scoring(models)
    cases, left_out = _shared_cases(models, common_cases)
    _check_same_references(models, cases)
    rows = []
    for label, metric in _shared_entries(models, cases, wanted, explicit=metrics is not None):
        values = [[_number(m.values[case][label].get(metric)) for case in cases] for m in models]
        for i, j in combinations(range(len(models)), 2):
            result = paired_statistics(values[i], values[j], seed=seed)
            undefined = [sum(math.isnan(v) for v in values[k]) for k in (i, j)]
            row = {"label": label, "metric": metric, "higher_is_better": HIGHER_IS_BETTER[metric]}
            row |= {"first": models[i].name, "second": models[j].name}
            rows.append(row | {"undefined_first": undefined[0], "undefined_second": undefined[1]} | asdict(result))
    for test in TESTS:
        for row, adjusted in zip(rows, holm([row[test] for row in rows]), strict=True):
            row[f"{test}_holm"] = adjusted
    for row in rows:
        row["better"] = _verdict(row)
    return {
        "models": {m.name: str(m.file) for m in models},
        "cases": cases,
        "cases_left_out": left_out,
        "labels": models[0].report["labels"],
        "comparisons": rows,
        "method": _method(len(rows), seed),
        "implementation": models[0].report["implementation"],
        "provenance": provenance(),
    }


def write_comparison(comparison: Mapping[str, Any], out: str | Path) -> Path:
    """Write ``comparison.json`` into the folder ``out``."""
    file = Path(out) / COMPARISON
    write_json(file, comparison)
    return file


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparisons as text, one line each, then what is missing and how it was made."""
    header = ["label", "metric", "first", "second", "n", "mean 1", "mean 2", "difference [95 % CI]", "r_rb", "d_z"]
    lines = [[*header, "Wilcoxon (Holm)", "permutation (Holm)", "better"]]
    notes = []
    for row in comparison["comparisons"]:
        name = comparison["labels"].get(row["label"], row["label"])
        arrow = "up" if row["higher_is_better"] else "down"
        difference, low, high = (_shown(row[k], "+.4g") for k in ("difference", "ci_low", "ci_high"))
        lines.append(
            [name, f"{row['metric']} ({arrow})", row["first"], row["second"], str(row["n"])]
            + [_shown(row[k], ".4g") for k in ("mean_first", "mean_second")]
            + [f"{difference} [{low}, {high}]"]
            + [_shown(row[k], "+.2f") for k in ("rank_biserial", "cohens_dz")]
            + [f"{_shown(row[t], '.3g')} ({_shown(row[t + '_holm'], '.3g')})" for t in TESTS]
            + [row["better"] or "-"]
        )
        undefined = [f"{row[k]} in {row[m]}" for k, m in (("undefined_first", "first"), ("undefined_second", "second"))]
        where = f"{name} {row['metric']}, {row['first']} and {row['second']}"
        if row["undefined_first"] or row["undefined_second"]:
            notes.append(f"{where}: not defined and left out: {', '.join(undefined)}")
        if row["note"]:
            notes.append(f"{where}: {row['note']}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    left_out = [f"cases of {name} left out: {' '.join(c)}" for name, c in comparison["cases_left_out"].items() if c]
    return "\n".join([*text, *notes, *left_out, comparison["method"]])


def _method(tests: int, seed: int) -> str:
    return (
        f"difference = second - first; {CONFIDENCE:.0%} bootstrap interval of the mean difference (BCa, {RESAMPLES} "
        f"resamples); two-sided Wilcoxon signed-rank and paired permutation test (at most {RESAMPLES} exchanges), not "
        f"below {MIN_PAIRS} pairs; Holm's correction over the {tests} rows, per test; better: the corrected Wilcoxon p "
        f"is below {ALPHA}; seed {seed}"
    )


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _load(name: str, file: Path) -> Model:
    report = load_json(file, "Make it first: nnunet_diffext evaluate -pred FOLDER -gt FOLDER")
    try:
        values = {}
        for row in report["metric_per_case"]:
            entries = {key: dict(metrics) for key, metrics in row["metrics"].items()}
            for metrics in entries.values():
                error = metrics["volume_error"]
                metrics[ABSOLUTE_VOLUME_ERROR] = None if error is None else abs(error)
            values[row["case"]] = entries | {POOLED: row.get("calibration", {})}
        return Model(name, file, values, {k: report[k] for k in ("labels", "implementation", "options")})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no summary of nnunet_diffext evaluate ({type(error).__name__}: {error}); nnU-Net's own "
            "summary.json does not hold what is compared here"
        ) from error


def _short_names(files: Sequence[Path]) -> list[str]:
    folders = [f.parent.parts if f.name == OUTPUTS[0] else f.parts for f in files]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in files]


def _check_same_scoring(models: Sequence[Model]) -> None:
    for model in models[1:]:
        for key in ("labels", "options", "implementation"):
            if model.report[key] != models[0].report[key]:
                raise ValueError(
                    f"{models[0].file} and {model.file} differ in their {key}: {models[0].report[key]} and "
                    f"{model.report[key]}. Evaluate both in the same way first."
                )


def _shared_cases(models: Sequence[Model], common_cases: bool) -> tuple[list[str], dict[str, list[str]]]:
    shared = set.intersection(*(set(m.values) for m in models))
    left_out = {m.name: sorted(set(m.values) - shared) for m in models}
    if any(left_out.values()) and not common_cases:
        listing = "; ".join(f"{name}: {' '.join(cases)}" for name, cases in left_out.items() if cases)
        raise ValueError(
            f"the models were not evaluated on the same cases. Not in all of them are, of {listing}. Evaluate the "
            f"missing ones, or compare on the {len(shared)} common case(s) with --common-cases."
        )
    if not shared:
        raise ValueError("the models have no case in common")
    return sorted(shared), left_out


def _check_same_references(models: Sequence[Model], cases: Sequence[str]) -> None:
    """The reference's number of voxels per label gives away a comparison against different references."""
    for model in models[1:]:
        for case in cases:
            for label in model.report["labels"]:
                sizes = [m.values[case][label].get("n_ref") for m in (models[0], model)]
                if sizes[0] != sizes[1]:
                    raise ValueError(
                        f"{models[0].name} and {model.name} were not scored against the same reference: label {label} "
                        f"of case {case} has {sizes[0]} and {sizes[1]} voxels there"
                    )


def _shared_entries(
    models: Sequence[Model], cases: Sequence[str], wanted: Sequence[str], explicit: bool
) -> Iterator[tuple[str, str]]:
    """(label, metric) that all models have; calibration of the decision comes last."""
    entries = [(label, metric) for label in (*models[0].report["labels"], POOLED) for metric in wanted]
    found = [(k, m) for k, m in entries if all(any(m in x.values[c][k] for c in cases) for x in models)]
    missing = sorted(set(wanted) - {metric for _, metric in found}, key=wanted.index)
    if missing and explicit:
        raise ValueError(
            f"not every model has {', '.join(missing)}: calibration needs the probabilities (--save_probabilities) "
            "beside the predictions when they are evaluated"
        )
    yield from found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _verdict(row: Mapping[str, Any]) -> str | None:
    # NaN compares as False: no test, no verdict.
    if not row["wilcoxon_p_holm"] < ALPHA or row["rank_biserial"] == 0:
        return None
    # The sign of the ranks, because that is what the test is about; a mean may point elsewhere.
    return row["second"] if (row["rank_biserial"] > 0) == row["higher_is_better"] else row["first"]
