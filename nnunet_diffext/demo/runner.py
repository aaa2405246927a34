"""The demo from nothing to a table: data, planning, two trainings, predictions, metrics and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_diffext.demo.commands import CommandResult, EpochReport, in_environment, nnunet_environment, run_command
from nnunet_diffext.demo.synthetic import FILE_ENDING, LABELS, write_dataset
from nnunet_diffext.evaluation.folder import by_name, evaluate_predictions
from nnunet_diffext.evaluation.metrics import json_ready
from nnunet_diffext.evaluation.provenance import provenance

DATASET_ID = "990"
DATASET = f"Dataset{DATASET_ID}_DiffextDemo"
CONFIGURATION = "3d_fullres"
PLANS = "nnUNetPlans"
MARKER = ".nnunet_diffext_demo"
FEATURE_DIVISOR = 4


@dataclass(frozen=True)
class DemoOptions:
    """Size of the demo. ``epochs`` times ``iterations`` optimiser steps are given to each of the two trainers."""

    out: Path
    epochs: int = 10
    iterations: int = 50
    labeled: int = 6
    unlabeled: int = 16
    test: int = 4
    seed: int = 0
    device: str = "cpu"
    processes: int = 2

    def trainers(self) -> dict[str, str]:
        """What to call it in the table -> the name for nnU-Net's -tr."""
        budget = f"{self.epochs}epochs_{self.iterations}iters_2valiters_seed{self.seed}"
        return {"nnU-Net": f"nnUNetTrainer_{budget}", "DMED-Seg": f"DMEDSegTrainer_{budget}"}


def quick(out: Path) -> DemoOptions:
    """The smallest run that still goes through every step: two optimiser steps per trainer, results meaningless."""
    return DemoOptions(out, epochs=1, iterations=2, labeled=5, unlabeled=2, test=1)


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make the demo's folder.

    Raises:
        ValueError: it holds something, and is not an earlier demo that may be overwritten.
    """
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ValueError(f"{out} is not empty and was not made by the demo. Choose another folder with --out.")
        if not overwrite:
            raise ValueError(f"{out} holds an earlier demo. Choose another folder with --out, or add --overwrite.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def shrink_network(plans_file: Path) -> str:
    """Fewer features and a smaller patch in the plans, for which nnU-Net has no option. Returns what was done."""
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"][CONFIGURATION]
    arguments = configuration["architecture"]["arch_kwargs"]
    before = arguments["features_per_stage"]
    arguments["features_per_stage"] = [f // FEATURE_DIVISOR for f in before]
    planned = configuration["patch_size"]
    configuration["patch_size"] = [16, 32, 32]
    plans_file.write_text(json.dumps(plans, indent=4) + "\n")
    return (
        f"edited {plans_file.name}: features_per_stage {before} -> {arguments['features_per_stage']}, "
        f"patch {planned} -> {configuration['patch_size']}, so that it trains in minutes on a CPU"
    )


class Demo:
    """One run of the demo; `run` does everything."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.out = options.out.resolve()
        self.env = nnunet_environment(self.out, options.processes)
        self.raw = Path(self.env["nnUNet_raw"]) / DATASET
        self.commands: list[dict[str, Any]] = []

    def _run(self, arguments: Sequence[str], log: str, report: EpochReport | None = None) -> CommandResult:
        result = run_command(arguments, self.env, self.out / "logs" / f"{log}.log", report=report)
        self.commands.append({"command": result.command, "seconds": round(result.seconds, 1)})
        return result

    def prepare(self) -> None:
        """Make the dataset, plan and preprocess it, the unlabelled images too."""
        o = self.options
        write_dataset(self.raw, o.labeled, o.unlabeled, o.test, o.seed)
        print(
            f"wrote {o.labeled} labelled, {o.unlabeled} unlabelled and {o.test} test volumes to {self.raw}", flush=True
        )
        jobs = str(o.processes)
        self._run(
            ["nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", CONFIGURATION, "-gpu_memory_target", "1",
             "--verify_dataset_integrity", "-npfp", jobs, "-np", jobs, "--no_pbar"],
            "plan_and_preprocess",
        )  # fmt: skip
        print(shrink_network(Path(self.env["nnUNet_preprocessed"]) / DATASET / f"{PLANS}.json"), flush=True)
        self._run(["nnunet_diffext", "preprocess_unlabeled", "-d", DATASET_ID, "-c", CONFIGURATION], "unlabeled")

    def train_and_predict(self, trainer: str) -> dict[str, Any]:
        """Train fold 0, predict imagesTs, score the predictions. Returns the metrics `by_name`, and the durations.

        Raises:
            ValueError: a test case could not be scored.
        """
        device = ["-device", self.options.device]
        training = self._run(
            ["nnUNetv2_train", DATASET_ID, CONFIGURATION, "0", "-tr", trainer, *device],
            f"train_{trainer}",
            EpochReport(self.options.epochs),
        )
        prediction = self._run(
            ["nnUNetv2_predict", "-i", str(self.raw / "imagesTs"), "-o", str(self.predictions(trainer)),
             "-d", DATASET_ID, "-c", CONFIGURATION, "-f", "0", "-tr", trainer, "-npp", "1", "-nps", "1", *device],
            f"predict_{trainer}",
        )  # fmt: skip
        result = evaluate_predictions(
            self.predictions(trainer), self.raw / "labelsTs", num_processes=self.options.processes
        )
        if result.problems():
            raise ValueError("\n".join(result.problems()))
        return {
            "trainer": trainer,
            "training_s": round(training.seconds, 1),
            "prediction_s": round(prediction.seconds, 1),
            **by_name(result.report),
        }

    def predictions(self, trainer: str) -> Path:
        """Folder of a trainer's predicted test cases."""
        return self.out / "predictions" / trainer

    def test_cases(self) -> list[str]:
        """Identifiers of the test cases."""
        return sorted(p.name.removesuffix(FILE_ENDING) for p in (self.raw / "labelsTs").glob("*" + FILE_ENDING))

    def draw(self, trainers: Mapping[str, str]) -> list[Path]:
        """One picture per test case, with the experts' weight and the confidence of the last trainer."""
        # Here: matplotlib and torch are not needed before, and the first minutes of the demo should not wait for them.
        from nnunet_diffext.demo.pictures import draw_case
        from nnunet_diffext.inference.experts import expert_maps

        print("drawing the test cases", flush=True)
        *_, method = trainers.values()
        model = Path(self.env["nnUNet_results"]) / DATASET / f"{method}__{PLANS}__{CONFIGURATION}"
        files = []
        for case in self.test_cases():
            image = self.raw / "imagesTs" / f"{case}_0000{FILE_ENDING}"
            name = case + FILE_ENDING
            # nnU-Net's finder and predictor print a dozen lines per call.
            with in_environment(self.env), open(self.out / "logs" / "draw.log", "a") as log, redirect_stdout(log):
                maps = expert_maps(model, [str(image)], fold=0, device=self.options.device)
            predicted = {title: self.predictions(trainer) / name for title, trainer in trainers.items()}
            files.append(self.out / "pictures" / f"{case}.png")
            draw_case(image, self.raw / "labelsTs" / name, predicted, maps, LABELS, files[-1])
        return files

    def run(self) -> dict[str, Any]:
        """Everything. Writes summary.json, summary.md and the pictures; returns what is in summary.json.

        Raises:
            CommandError: a command failed; the message shows its last lines and names its log.
        """
        self.prepare()
        trainers = self.options.trainers()
        results = {title: self.train_and_predict(trainer) for title, trainer in trainers.items()}
        pictures = self.draw(trainers)
        summary = {
            "options": {key: str(v) if isinstance(v, Path) else v for key, v in asdict(self.options).items()},
            "results": results,
            "commands": self.commands,
            "pictures": [str(p.relative_to(self.out)) for p in pictures],
            **provenance(),
        }
        (self.out / "summary.json").write_text(json.dumps(json_ready(summary), indent=1, allow_nan=False) + "\n")
        text = markdown(summary)
        (self.out / "summary.md").write_text(text, encoding="utf-8")
        print("\n" + text)
        print(f"pictures: {self.out / 'pictures'}\nsummary: {self.out / 'summary.md'}, {self.out / 'summary.json'}")
        return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """Short report: mean Dice per label of both trainers on the test cases, and how it was made."""
    names = [name for name in LABELS if name != "background"]
    rows = [["trainer", *names, "mean", "training"], ["---"] * (len(names) + 3)]
    for title, result in summary["results"].items():
        dice = [result["mean"][name]["dice"] for name in names]
        # A label that is in no test case is NaN; then so is the mean, rather than a mean over other labels.
        values = [f"{d:.3f}" for d in (*dice, sum(dice) / len(dice))]
        rows.append([title, *values, f"{result['training_s']:.0f} s"])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    o = summary["options"]
    return (
        f"# nnunet_diffext demo\n\nMean Dice of {o['test']} test volumes. {o['labeled']} labelled volumes, of "
        f"which fold 0 trains on four fifths; {o['unlabeled']} unlabelled ones that only DMED-Seg sees; "
        f"{o['epochs']} x {o['iterations']} optimiser steps for each trainer, seed {o['seed']}.\n\n{table}\n\n"
        f"Synthetic data and one short run: this shows how things are done, not which method is better.\n\n"
        f"{summary['date']}, {summary['cpu']}, {summary['cores']} cores, "
        f"{', '.join(f'{k} {v}' for k, v in summary['versions'].items())}\n\n"
        + "\n".join(f"    {c['command']}" for c in summary["commands"])
        + "\n"
    )
