"""Shared by the benchmark scripts: small plans, trainings and predictions by the commands, one json file of results."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffext.demo.commands import EpochReport, run_command
from nnunet_diffext.files import CALIBRATION, FINAL

CONFIGURATION, PLANS = "3d_fullres", "nnUNetPlans"


def load_json(path: Path) -> dict[str, Any]:
    """Content of a json file, an empty dict where there is none yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


def save_json(content: Any, path: Path) -> None:
    """Write through a temporary file and a rename: an interrupted benchmark never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def shrink(plans_file: Path, patch: Sequence[int], features: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Give the plans a patch, a batch of two and a network that two CPU cores train in minutes.

    Kernels are 1 along an axis that the next stage does not downsample, as nnU-Net has it for thick slices.
    """
    plans = load_json(plans_file)
    stages = len(features)
    configuration = plans["configurations"][CONFIGURATION]
    configuration.update(patch_size=list(patch), batch_size=2)
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages, "features_per_stage": list(features), "strides": [list(s) for s in strides],
        "kernel_sizes": [[3 if s > 1 else 1 for s in following] for following in (*strides[1:], [2] * len(patch))],
        "n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1),
    }  # fmt: skip
    save_json(plans, plans_file)


def prepare_dataset(dataset: str, env: dict[str, str], logs: Path, edit: Callable[[Path], None]) -> Path:
    """Fingerprint, plan, ``edit`` the plans file, preprocess; once. Returns the preprocessed folder."""
    folder, number = Path(env["nnUNet_preprocessed"]) / dataset, dataset[7:10]
    if not (folder / "prepared").is_file():
        log = logs / f"prepare_{dataset}.log"
        run_command(["nnUNetv2_extract_fingerprint", "-d", number, "-np", "1", "--no_pbar"], env, log)
        run_command(["nnUNetv2_plan_experiment", "-d", number], env, log)
        edit(folder / f"{PLANS}.json")
        run_command(["nnUNetv2_preprocess", "-d", number, "-c", CONFIGURATION, "-np", "1", "--no_pbar"], env, log)
        (folder / "prepared").touch()
    return folder


def train_fold(
    dataset: str, trainer: str, env: dict[str, str], logs: Path, fold: int = 0, plans: str = PLANS, **variables: str
) -> Path:
    """One training by the stock command unless it is finished; ``variables`` add to the environment.

    Returns:
        The model folder.
    """
    folder = Path(env["nnUNet_results"]) / dataset / f"{trainer}__{plans}__{CONFIGURATION}"
    if not (folder / f"fold_{fold}" / FINAL).is_file():
        shutil.rmtree(folder / f"fold_{fold}", ignore_errors=True)
        command = ["nnUNetv2_train", dataset[7:10], CONFIGURATION, str(fold), "-tr", trainer, "-p", plans]
        epochs = int(re.findall(r"_(\d+)epochs", trainer)[0])
        log = logs / f"{dataset}_{trainer}_{plans}_{fold}.log"
        run_command([*command, "-device", "cpu"], {**env, **variables}, log, report=EpochReport(epochs))
    return folder


def seconds_per_epoch(*logs: Path) -> float | None:
    """Median of the epoch times in seconds that nnU-Net printed, None where there are none."""
    times = [float(t) for log in logs for t in re.findall(r"Epoch time: ([\d.]+) s", log.read_text())]
    return statistics.median(times) if times else None


def predict(images: Path, out: Path, model: Path, fold: int, env: dict[str, str], logs: Path, *flags: str) -> None:
    """A folder of images through ``nnunet_diffext predict``, no mirroring; ``out`` starts empty."""
    shutil.rmtree(out, ignore_errors=True)
    command = ["nnunet_diffext", "predict", "-i", str(images), "-o", str(out), "-m", str(model), "-f", str(fold)]
    command += ["--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1", *flags]
    run_command(command, env, logs / f"predict_{out.name}.log")


def temperature(model: Path, fold: int, env: dict[str, str], logs: Path) -> float:
    """Fitted on the validation volumes of a fold by ``nnunet_diffext calibrate``; it is stored in the model folder."""
    command = ["nnunet_diffext", "calibrate", "-m", str(model), "-f", str(fold), "--disable_tta", "-device", "cpu"]
    run_command(command, env, logs / f"calibrate_{model.name}_{fold}.log")
    return load_json(model / CALIBRATION)["temperature"]


def _format(values: list[float | None], scale: float, digits: int) -> str:
    known = [v * scale for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def _gain(entries: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> str:
    """Dice difference to the baseline over the cases (seeds averaged first): mean ± standard error, in points."""
    ids = sorted(set(entries[0]["per_case"]))
    if not baseline or ids != sorted(set(baseline[0]["per_case"])):
        return "-"
    differences = [
        100 * (statistics.mean(e["per_case"][i]["dice"] for e in entries)
               - statistics.mean(e["per_case"][i]["dice"] for e in baseline))
        for i in ids
    ]  # fmt: skip
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {error:.2f}"


def comparison_table(content: dict[str, Any]) -> str:
    """Markdown table of the runs in a result file.

    Mean ± standard deviation over seeds; the gain over stock4 (tune:stock4 for tuning runs) is paired by case.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in content.get("runs", {}).values():
        budget = "/".join(re.findall(r"(\d+)epochs_(\d+)iters", entry["trainer"])[0])
        groups.setdefault((entry["run"], budget), []).append(entry)
    header = ["run", "epochs/iterations", "seeds", "Dice %", "Jaccard %", "HD95 mm", "ASD mm"]
    header += ["Dice gain over stock4", "s/epoch", "min"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (name, budget), entries in groups.items():
        reference = "tune:stock4" if name.startswith("tune:") else "stock4"
        same_budget = [es for (n, b), es in groups.items() if n == reference and (b == budget or "long" in name)]
        baselines = [entry for es in same_budget for entry in es]
        row = [name, budget, str(len(entries))]
        for metric, scale, digits in (("dice", 100, 2), ("jaccard", 100, 2), ("hd95", 1, 2), ("asd", 1, 2)):
            row.append(_format([e["mean"][metric] for e in entries], scale, digits))
        row.append("" if name == reference else _gain(entries, baselines))
        row.append(_format([e.get("seconds_per_epoch") for e in entries], 1, 1))
        row.append(_format([e.get("wallclock_s") for e in entries], 1 / 60, 1))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
