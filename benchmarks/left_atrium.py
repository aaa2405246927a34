"""DMED-Seg against stock nnU-Net on the left atrium dataset: 4 labelled and 60 unlabelled volumes, 16 for validation.

    python benchmarks/left_atrium.py --data .../Dataset910_LeftAtrium --work DIR --runs stock4 stock64 dmed --seeds 1 2
    python benchmarks/left_atrium.py --table

Plans and iterations are the same for every run (2.5 mm, patch 24x40x48, features 16-32-64-128, batch 2), and every
training is the command that is printed. A run is a pair of trainer name and fold:

    stock4      stock nnU-Net, 4 labels              stock64     stock nnU-Net, all 64 labels
    stock4long  stock nnU-Net, 4 labels, --wallclock-ratio times as many epochs
    dmed        DMEDSegTrainer                       TOKENS      DMEDSegTrainer_TOKENS: noCACL, CEonly, ...
    tune:RUN    the same on fold 2, which holds none of the 16 validation volumes, neither as images nor as labels
    all:RUN     the same on fold 1, all 64 labels
    LEAFTrainer_noAlign, PGRDTrainer, ...    any other trainer of the package, with its tokens

Trainings that build on others find them through nnUNet_diffext_prior and nnUNet_diffext_codec, as always.

Runs that are finished are not repeated. Results are added to --out after every run.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CONFIGURATION, comparison_table, load_json, save_json, seconds_per_epoch, shrink

from nnunet_diffext.demo.commands import CommandResult, EpochReport, nnunet_environment, run_command
from nnunet_diffext.evaluation.folder import by_name, evaluate_predictions
from nnunet_diffext.evaluation.metrics import METRICS, json_ready
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.files import RECONSTRUCTION
from nnunet_diffext.trainers import TRAINERS
from nnunet_diffext.variants import split_name

PLANS = "nnUNetPlansQ"
TABLE2 = ("CEonly", "DEonly", "fixedAverage", "noCACL", "dmed", "noCACL_IEFA", "IEFA")
STOCK = {"stock4": 0, "stock4long": 0, "stock64": 1}
FOLDS = {"tune": 2, "all": 1}
LABEL = "left atrium"


def cases(first: int, last: int) -> list[str]:
    """Identifiers la_FIRST ... la_LAST, both included."""
    return [f"la_{i:03d}" for i in range(first, last + 1)]


def make_splits() -> list[dict[str, list[str]]]:
    """Fold 0: 4 labels; fold 1: 64 labels, same validation; fold 2: 4 labels, validated on training volumes."""
    return [
        {"train": cases(0, 3), "unlabeled": cases(4, 63), "val": cases(64, 79)},
        {"train": cases(0, 63), "val": cases(64, 79)},
        {"train": cases(0, 3), "unlabeled": cases(4, 43), "val": cases(44, 63)},
    ]


def prepare(data: Path, work: Path) -> dict[str, str]:
    """Fingerprint, plan, preprocess and split below ``work``; each step is skipped where its result exists.

    Returns the environment for nnU-Net commands.

    Raises:
        ValueError: ``data`` is not a raw nnU-Net dataset folder.
    """
    match = re.fullmatch(r"Dataset(\d{3})_\w+", data.name)
    if match is None or not (data / "dataset.json").is_file():
        raise ValueError(f"--data must be a raw nnU-Net dataset folder DatasetXXX_NAME with a dataset.json; got {data}")
    dataset_id = str(int(match[1]))
    env = nnunet_environment(work)
    raw = Path(env["nnUNet_raw"]) / data.name
    if not raw.exists():
        raw.symlink_to(data.resolve(), target_is_directory=True)
    folder = Path(env["nnUNet_preprocessed"]) / data.name
    logs = work / "logs"
    if not (folder / "dataset_fingerprint.json").is_file():
        run_command(
            ["nnUNetv2_extract_fingerprint", "-d", dataset_id, "-np", "2", "--verify_dataset_integrity", "--no_pbar"],
            env, logs / "fingerprint.log",
        )  # fmt: skip
    done = folder / "prepared"
    if not done.is_file():
        run_command(
            ["nnUNetv2_plan_experiment", "-d", dataset_id, "-overwrite_target_spacing", "2.5", "2.5", "2.5",
             "-overwrite_plans_name", PLANS, "-gpu_memory_target", "1"],
            env, logs / "plan.log",
        )  # fmt: skip
        shrink(folder / f"{PLANS}.json", (24, 40, 48), (16, 32, 64, 128), ([1] * 3, *[[2] * 3] * 3))
        run_command(
            ["nnUNetv2_preprocess", "-d", dataset_id, "-plans_name", PLANS, "-c", CONFIGURATION, "-np", "2",
             "--no_pbar"],
            env, logs / "preprocess.log",
        )  # fmt: skip
        done.touch()
    save_json(make_splits(), folder / "splits_final.json")
    return env


@dataclass(frozen=True)
class Run:
    """One training: its name in the results, the trainer class to ask nnU-Net for and the fold."""

    name: str
    trainer: str
    fold: int
    seed: int
    epochs: int


def make_run(name: str, seed: int, epochs: int, iterations: int, wallclock_ratio: float | None) -> Run:
    """Resolve a run name (module docstring) to a trainer name and fold.

    Raises:
        ValueError: ``stock4long`` without --wallclock-ratio, or a prefix that does not go with the run.
    """
    prefix, _, plain = name.rpartition(":")
    fold = STOCK.get(plain, 0)
    if prefix:
        if fold != 0 or prefix not in FOLDS:
            raise ValueError(f"'{name}': write one of {', '.join(FOLDS)} before ':', and none before stock64")
        fold = FOLDS[prefix]
    if plain == "stock4long":
        if wallclock_ratio is None:
            raise ValueError("stock4long needs --wallclock-ratio: seconds per epoch of dmed over those of stock4")
        epochs = round(epochs * wallclock_ratio)
    base, tokens = "DMEDSegTrainer", [plain]
    if split_name(plain, TRAINERS) is not None:
        base, tokens = plain, []
    elif plain in (*STOCK, "dmed"):
        base, tokens = "nnUNetTrainer" if plain in STOCK else base, []
    budget = [f"{epochs}epochs", f"{iterations}iters", "5valiters", f"seed{seed}"]
    return Run(name, "_".join([base, *tokens, *budget]), fold, seed, epochs)


def train(run: Run, dataset: str, env: dict[str, str], work: Path) -> tuple[Path, dict[str, Any]]:
    """Train unless the final validation of this run exists. Returns the fold folder and what was measured."""
    output = Path(env["nnUNet_results"]) / dataset / f"{run.trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{run.fold}"
    record = output / "benchmark_run.json"
    if record.is_file() and any((output / "validation" / name).is_file() for name in ("summary.json", RECONSTRUCTION)):
        print(f"{run.name} seed {run.seed}: finished before, not repeated ({output})", flush=True)
        return output, load_json(record)
    if output.is_dir():
        shutil.rmtree(output)  # an aborted run: its wall-clock could not be known if it were continued
    dataset_id = str(int(dataset[len("Dataset") : len("Dataset") + 3]))
    arguments = ["nnUNetv2_train", dataset_id, CONFIGURATION, str(run.fold), "-tr", run.trainer, "-p", PLANS]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    load = os.getloadavg()[0]
    result: CommandResult = run_command(
        [*arguments, "-device", "cpu"],
        env,
        work / "logs" / f"{run.trainer}_fold{run.fold}.log",
        report=EpochReport(run.epochs),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured = {
        "command": result.command,
        "wallclock_s": round(result.seconds, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load_average_before": round(load, 2),
        "seconds_per_epoch": seconds_per_epoch(result.log),
        **provenance(),
    }
    save_json(measured, record)
    return output, measured


def evaluate(run: Run, output: Path, measured: dict[str, Any], data: Path, out: Path) -> dict[str, Any]:
    """Score the final validation at the images' own resolution and add it to ``out``.

    Raises:
        ValueError: a validation case could not be scored.
    """
    result = evaluate_predictions(
        output / "validation", data / "labelsTr", dataset_json=data / "dataset.json", num_processes=2
    )
    report = by_name(result.report)
    absent = sorted(set(make_splits()[run.fold]["val"]) - set(report["cases"]))
    if absent or result.failed:
        raise ValueError(f"{run.name}: not scored: {', '.join(absent)} {result.failed or ''}")
    per_case = {c: {m: round(v[LABEL][m], 5) for m in METRICS} for c, v in report["cases"].items()}
    summary = report["mean"][LABEL]
    entry = {
        "run": run.name,
        "trainer": run.trainer,
        "fold": run.fold,
        "seed": run.seed,
        "mean": {metric: summary[metric] for metric in METRICS},
        "surface_undefined": summary["surface_undefined"],
        "per_case": per_case,
        **measured,
    }
    content = load_json(out)  # again, so that two of these scripts may add to one file
    content.setdefault("metrics", report["implementation"])
    content.setdefault("runs", {})[f"{run.trainer} fold {run.fold}"] = json_ready(entry)
    save_json(content, out)
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder Dataset910_LeftAtrium")
    parser.add_argument("--work", type=Path, help="folder for preprocessed data, results and logs")
    parser.add_argument("--runs", nargs="+", default=[], help=f"run names; the paper's Table 2 is {' '.join(TABLE2)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--iters", type=int, default=100, help="iterations per epoch")
    parser.add_argument("--wallclock-ratio", type=float, help="for stock4long: seconds per epoch of dmed over stock4")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--prepare-only", action="store_true", help="plan, preprocess and split, train nothing")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    args = parser.parse_args()
    if args.table:
        print(comparison_table(load_json(args.out)))
        return 0
    if args.data is None or args.work is None:
        parser.error("--data and --work are needed, except with --table")
    runs = [make_run(n, s, args.epochs, args.iters, args.wallclock_ratio) for s in args.seeds for n in args.runs]
    env = prepare(args.data.resolve(), args.work)
    if args.prepare_only:
        print(f"prepared: {env['nnUNet_preprocessed']}")
        return 0
    for run in runs:
        output, measured = train(run, args.data.resolve().name, env, args.work)
        reconstruction = output / "validation" / RECONSTRUCTION
        if reconstruction.is_file():  # an autoencoder segments nothing
            found = load_json(reconstruction)
            content = load_json(args.out)
            content.setdefault("autoencoders", {})[f"{run.trainer} fold {run.fold}"] = {**found, **measured}
            save_json(content, args.out)
            print(f"{run.name} seed {run.seed}: reconstruction {found}", flush=True)
            continue
        entry = evaluate(run, output, measured, args.data.resolve(), args.out)
        print(f"{run.name} seed {run.seed}: Dice {entry['mean']['dice']:.4f}", flush=True)
    print(comparison_table(load_json(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
