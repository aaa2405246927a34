"""Files of results: written whole or not at all, strict JSON, CSV with one row per case and label."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffext.evaluation.metrics import json_ready
from nnunet_diffext.files import write_atomically


def write_result(path: Path, content: bytes | str) -> None:
    """Write a file of the evaluation in one step.

    Raises:
        ValueError: the folder is not writable or the disk is full; an older file is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"could not write {path}: {error}; free disk space, check permissions, or use -o") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON: what is not defined (NaN) is null."""
    write_result(path, json.dumps(json_ready(content), indent=1, allow_nan=False) + "\n")


def metrics_csv(metric_per_case: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """One row per case and label; empty where a metric is not defined.

    Args:
        metric_per_case: as in summary_diffext.json; all rows hold the same metrics.
        names: label key -> name.
    """
    text = io.StringIO()
    metrics = list(next(iter(metric_per_case[0]["metrics"].values())))
    writer = csv.DictWriter(text, ["case", "label", "name", *metrics], lineterminator="\n")
    writer.writeheader()
    for row in metric_per_case:
        for key, values in row["metrics"].items():
            shown = {name: "" if math.isnan(value) else repr(float(value)) for name, value in values.items()}
            writer.writerow({"case": row["case"], "label": key, "name": names[key], **shown})
    return text.getvalue()
