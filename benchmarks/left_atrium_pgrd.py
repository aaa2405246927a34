"""PGRD around nnU-Net on the left atrium: Dice and calibration next to its prior, and the curve over steps.

    python benchmarks/left_atrium.py --data .../Dataset910_LeftAtrium --work DIR --runs stock4 stock64
    python benchmarks/left_atrium_pgrd.py --data .../Dataset910_LeftAtrium --work DIR --labels 4 64
    python benchmarks/left_atrium_pgrd.py --data .../Dataset910_LeftAtrium --work DIR --labels 64 --curve
    python benchmarks/left_atrium_pgrd.py --table

Plans, iterations and the 16 validation volumes are those of left_atrium.py. Temperatures, of the prior and of PGRD, are
fitted on these very volumes. PGRD knows of them how large the prior's errors are there, because it trains around a
prior that is made to err as much ('corrupted'). No mirroring. A model folder has one temperature, so the runs of 4 and
64 labels must not overlap in time.
The curve (the paper's Fig. 3) has one sample per number of steps on the first volumes of the validation set; the name
of the vanilla DDPM has ten steps, because nnU-Net's validation after the training would take a thousand.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from common import CONFIGURATION, load_json, predict, save_json, temperature
from left_atrium import LABEL, PLANS, Run, make_run, make_splits, prepare, train

from nnunet_diffext.evaluation.folder import evaluate_predictions
from nnunet_diffext.evaluation.metrics import json_ready
from nnunet_diffext.evaluation.provenance import provenance

FOLDS = {4: 0, 64: 1}
CURVE = {"PGRD": ("", "ddim"), "noPGR": ("_noPGR", "ddim"), "vanilla DDPM": ("_vanillaDDPM_10steps", "ddpm")}
STEPS = (1, 2, 5, 10, 20, 50, 100, 300)
FIGURES = ("nll_band", "ece_band", "nll", "ece")


class Benchmark:
    """Trains, predicts and scores; trainings that are finished are not repeated."""

    def __init__(self, data: Path, work: Path, epochs: int, iterations: int, out: Path, tokens: str) -> None:
        self.data, self.work, self.out, self.tokens = data, work, out, tokens
        self.epochs, self.iterations = epochs, iterations
        self.env = prepare(data, work)
        self.results = Path(self.env["nnUNet_results"]) / data.name

    def run(self, trainer: str, labels: int) -> Run:
        """A training on so many labels."""
        name = f"all:{trainer}" if FOLDS[labels] else trainer
        return make_run(name, 1, self.epochs, self.iterations, None)

    def model(self, run: Run) -> Path:
        """Its folder."""
        return self.results / f"{run.trainer}__{PLANS}__{CONFIGURATION}"

    def prior(self, labels: int) -> Path:
        """Folder of the stock nnU-Net of so many labels, which left_atrium.py trained."""
        return self.model(make_run(f"stock{labels}", 1, self.epochs, self.iterations, None))

    def train(self, trainer: str, labels: int) -> Path:
        """Train around the stock nnU-Net of the same labels; returns the model folder."""
        run, prior = self.run(trainer, labels), str(self.prior(labels))
        train(run, self.data.name, {**self.env, "nnUNet_diffext_prior": prior}, self.work)
        return self.model(run)

    def images(self, count: int) -> Path:
        """A folder with the first validation images."""
        folder = self.work / f"first_{count}_images"
        folder.mkdir(exist_ok=True)
        for case in make_splits()[0]["val"][:count]:
            link = folder / f"{case}_0000.nii.gz"
            if not link.exists():
                link.symlink_to((self.data / "imagesTr" / link.name).resolve())
        return folder

    def score(self, name: str, model: Path, fold: int, *flags: str, count: int = 16) -> dict[str, float]:
        """Predict with probabilities through the command, and evaluate."""
        out = self.work / "predictions" / name.translate(str.maketrans(" ", "_", ",:"))
        start = time.perf_counter()
        predict(self.images(count), out, model, fold, self.env, self.work / "logs", "--save_probabilities", *flags)
        seconds = time.perf_counter() - start
        labels, content = self.data / "labelsTr", self.data / "dataset.json"
        result = evaluate_predictions(out, labels, dataset_json=content, num_processes=1)
        if result.failed:
            raise ValueError(f"{name}: not scored: {result.failed}")
        label = next(key for key, title in result.report["labels"].items() if title == LABEL)
        pooled = next(iter(result.report["calibration"]["pooled"].values()))
        scores = {"dice": result.report["mean"][label]["Dice"], **{key: pooled[key] for key in FIGURES}}
        scores["dice_per_case"] = [row["metrics"][label]["Dice"] for row in result.report["metric_per_case"]]
        shutil.rmtree(out)
        print(f"{name}: " + ", ".join(f"{k} {scores[k]:.4f}" for k in ("dice", *FIGURES)), flush=True)
        return scores | {"seconds": round(seconds, 1), "cases": count, "model": model.name, "provenance": provenance()}

    def record(self, group: str, name: str, entry: Any) -> None:
        """Add to the result file."""
        content = load_json(self.out)
        content.setdefault(group, {})[name] = json_ready(entry)
        save_json(content, self.out)

    def calibration(self, labels: int) -> None:
        """The prior, with the temperature, and PGRD."""
        fold, group, prior = FOLDS[labels], f"{labels} labels", self.prior(labels)
        self.record(group, "nnU-Net", self.score(f"{labels} prior", prior, fold, "--no_temperature"))
        fitted = temperature(prior, fold, self.env, self.work / "logs")
        scores = self.score(f"{labels} prior T", prior, fold)
        self.record(group, "nnU-Net + temperature", scores | {"temperature": fitted})
        model, name = self.train(f"PGRDTrainer{self.tokens}", labels), f"PGRD{self.tokens}"
        flags = ("--no_temperature", "-samples")
        self.record(group, f"{name}, one step", self.score(f"{labels} one step", model, fold, *flags, "0"))
        fitted = temperature(model, fold, self.env, self.work / "logs")
        scores = self.score(f"{labels} one step T", model, fold, "-samples", "0")
        self.record(group, f"{name}, one step + temperature", scores | {"temperature": fitted})
        several = (*flags, "4", "-steps", "10")
        self.record(group, f"{name}, 10 steps x 4", self.score(f"{labels} 10 x 4", model, fold, *several))

    def curve(self, labels: int, names: list[str], count: int) -> None:
        """One sample for every number of steps."""
        for name in names:
            tokens, sampler = CURVE[name]
            model = self.train(f"PGRDTrainer{tokens}{self.tokens}", labels)
            for steps in STEPS:
                if steps == 1 and sampler == "ddpm":
                    continue  # one step from pure noise is undefined for noise prediction
                flags = ("--no_temperature", "-samples", "1", "-steps", str(steps), "-sampler", sampler)
                scores = self.score(f"curve {name} {steps}", model, FOLDS[labels], *flags, count=count)
                self.record(f"curve, {labels} labels", f"{name}{self.tokens}, {steps}", scores)


def table(content: dict[str, Any]) -> str:
    """Markdown, one table per group; of the curve, one column per number of steps."""
    lines: list[str] = []
    for group in sorted(set(content) - {"provenance"}):
        rows, curve = content[group], group.startswith("curve")
        header = [str(s) for s in STEPS] if curve else ["Dice", "NLL, band", "ECE, band", "NLL", "ECE"]
        lines += [f"{group}:", "", "| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
        if curve:
            for key in ("dice", "nll_band", "ece_band"):
                for name in dict.fromkeys(row.rpartition(",")[0] for row in rows):
                    found = [rows.get(f"{name}, {steps}", {}).get(key) for steps in STEPS]
                    cells = ["" if value is None else f"{value:.4f}" for value in found]
                    lines.append(f"| {name}, {key} | " + " | ".join(cells) + " |")
        else:
            for name, row in rows.items():
                lines.append(f"| {name} | " + " | ".join(f"{row[k]:.4f}" for k in ("dice", *FIGURES)) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="raw dataset folder Dataset910_LeftAtrium")
    parser.add_argument("--work", type=Path, help="folder that left_atrium.py filled")
    parser.add_argument("--labels", nargs="+", type=int, choices=list(FOLDS), default=[64])
    parser.add_argument("--curve", nargs="*", choices=list(CURVE), help="the curve over steps, of these (default: all)")
    parser.add_argument("--curve-cases", type=int, default=4)
    parser.add_argument("--tokens", default="", help="more tokens for PGRD, such as _lr1e-3; they name the rows, too")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="only print the tables of --out")
    args = parser.parse_args()
    if not args.table:
        if args.data is None or args.work is None:
            parser.error("--data and --work are needed, except with --table")
        benchmark = Benchmark(args.data.resolve(), args.work, args.epochs, args.iters, args.out, args.tokens)
        for labels in args.labels:
            if args.curve is None:
                benchmark.calibration(labels)
            else:
                benchmark.curve(labels, args.curve or list(CURVE), args.curve_cases)
    print(table(load_json(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
