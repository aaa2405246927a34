"""Which cases are shown, and what the model said about itself in ``quality.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffext.files import QUALITY


def mean_dice(row: Mapping[str, Any]) -> float:
    """Mean over the labels whose Dice is defined; NaN if there is none."""
    known = [m["Dice"] for m in row["metrics"].values() if not math.isnan(m["Dice"])]
    return sum(known) / len(known) if known else math.nan


def best_and_worst(
    rows: Sequence[Mapping[str, Any]], number: int
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """``number`` best and worst cases by `mean_dice`, no case in both; of few cases, the worst come first."""
    ranked = sorted((r for r in rows if not math.isnan(mean_dice(r))), key=lambda r: (mean_dice(r), r["case"]))
    worst = ranked[:number]
    return ranked[len(worst) :][::-1][:number], worst


def read_quality(folder: Path) -> dict[str, float]:
    """Case -> the Dice that the model expected of itself (``quality``), where it is known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    file = folder / QUALITY
    if not file.is_file():
        raise FileNotFoundError(f"{folder.name} has no {QUALITY}; nnunet_diffext predict writes it.")
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            rows = [(row["case"], float(row["quality"] or "nan")) for row in csv.DictReader(handle)]
    except (csv.Error, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return {case: value for case, value in rows if math.isfinite(value)}
