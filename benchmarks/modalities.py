"""M4oE: one network for several modalities, next to one nnU-Net per dataset and one nnU-Net for all.

    python benchmarks/modalities.py --work DIR [--data .../Dataset910_LeftAtrium] [--rows ROW ...]
    python benchmarks/modalities.py --table

The data are those of modality_data.py: four partly annotated sources in three modalities. Test images have complete
labels, and a modality is asked for every label that one of its sources annotated. Trainings have the same patch, batch
and number of iterations; the pre-training of M4oE comes on top. With --data, a trained M4oE learns the left atrium as a
fourth modality, with and without its old parts frozen, and is tested on all four. What is finished is not repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import load_json, predict, save_json, seconds_per_epoch, train_fold
from modality_data import ATRIUM_MODALITY, FOUR, SOURCES, THREE, labels_of, prepare

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.demo.commands import nnunet_environment, run_command
from nnunet_diffext.demo.synthetic import FILE_ENDING, LABELS
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.files import FINAL
from nnunet_diffext.settings import PLANS_KEY

MODALITIES = tuple(dict.fromkeys(s.modality for s in SOURCES))
SIZE = "dim48_patch4"
SHORT = f"{SIZE}_lr2e-3"
"""A training of so few iterations needs a higher learning rate than the default."""


@dataclass(frozen=True)
class Row:
    """One training on the merged data: tokens of its trainer, and of the pre-training that it starts from."""

    trainer: str
    pretraining: str | None = None


ROWS = {
    "nnU-Net, merged": Row("nnUNetTrainer"),
    "nnU-Net, merged, mask": Row("nnUNetTrainer_maskUnannotated"),
    "M4oE": Row(f"M4oETrainer_{SHORT}", ""),
    "M4oE, modality0": Row(f"M4oETrainer_{SHORT}_modality0", ""),
    "M4oE, noMAE": Row(f"M4oETrainer_{SHORT}_noMAE"),
    "M4oE, noMAE, noStem": Row(f"M4oETrainer_{SHORT}_noMAE_noStem"),
    "M4oE, asBackground": Row(f"M4oETrainer_{SHORT}_asBackground", ""),
    "M4oE, woMoE": Row(f"M4oETrainer_{SHORT}_woMoE", "_plain"),
    "M4oE, encoderOnly": Row(f"M4oETrainer_{SHORT}_encoderOnly", ""),
    "M4oE, encoderOnly, noGN": Row(f"M4oETrainer_{SHORT}_encoderOnly_noGN", ""),
    "M4oE, decoderOnly": Row(f"M4oETrainer_{SHORT}_decoderOnly", "_plain"),
    "M4oE, decoderOnly, noGN": Row(f"M4oETrainer_{SHORT}_decoderOnly_noGN", "_plain"),
    "M4oE, noGN": Row(f"M4oETrainer_{SHORT}_noGN", ""),
    "M4oE, officialGate": Row(f"M4oETrainer_{SHORT}_officialGate", ""),
    "M4oE, top1": Row(f"M4oETrainer_{SHORT}_top1_balance0p01", ""),
}
NOT_GIVEN = ", modality not given"
PER_DATASET = "one nnU-Net per dataset"
GROWTH = {
    "fourth modality: before it is trained": None,
    "fourth modality: all trained on": f"M4oETrainer_{SHORT}",
    "fourth modality: freezeOld": f"M4oETrainer_{SHORT}_freezeOld",
    "four modalities from scratch, noMAE": f"M4oETrainer_{SHORT}_noMAE",
}


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """1 if both are empty."""
    total = int(prediction.sum() + reference.sum())
    return 2 * float((prediction & reference).sum()) / total if total else 1.0


def parameters(checkpoint: Path) -> int:
    """Of a network. What it knows by two names (a decoder holds its encoder) counts once."""
    weights = read_safely(checkpoint)["network_weights"].values()
    return sum({w.data_ptr(): w.numel() for w in weights if w.is_floating_point()}.values())


class Benchmark:
    """Trains, predicts and scores."""

    def __init__(
        self,
        work: Path,
        epochs: int,
        pretraining_epochs: int,
        iterations: int,
        seed: int,
        out: Path,
        atrium: Path | None,
    ) -> None:
        self.work, self.out = work, out
        self.budget, self.pretraining = (
            f"{n}epochs_{iterations}iters_2valiters_seed{seed}" for n in (epochs, pretraining_epochs)
        )
        self.env = nnunet_environment(work, num_processes=1)
        prepare(work, self.env, atrium)

    def train(self, dataset: str, trainer: str, budget: str | None = None, **variables: str) -> Path:
        """One training through the stock command; returns the model folder."""
        name = f"{trainer}_{budget or self.budget}"
        return train_fold(dataset, name, self.env, self.work / "logs", **variables)

    def predict(self, model: Path, modality: str, *flags: str) -> Path:
        """Test images of a modality."""
        out = self.work / "predictions" / f"{model.parent.name}_{model.name}" / "_".join([modality, *flags])
        if not (out / "quality.csv").is_file():
            images = self.work / "tests" / modality / "images"
            predict(images, out, model, 0, self.env, self.work / "logs", *flags)
        return out

    def score(self, predictions: Path, model: Path, modality: str, labels: Sequence[str]) -> dict[str, float]:
        """Mean Dice per label. Background in a prediction is whatever is none of its labels."""
        values = load_json(model / "dataset.json")["labels"]
        references = self.work / "tests" / modality / "labels"
        scores: dict[str, list[float]] = {label: [] for label in labels}
        for file in sorted(references.glob(f"*{FILE_ENDING}")):
            reference = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(predictions / file.name)))
            if modality != ATRIUM_MODALITY and "lesion" not in labels_of(modality):
                reference[reference == LABELS["lesion"]] = LABELS["liver"]
            for label in labels:
                true = reference == (LABELS[label] if modality != ATRIUM_MODALITY else 1)
                scores[label].append(dice(prediction == values[label], true))
        return {label: float(np.mean(v)) for label, v in scores.items()}

    def record(self, name: str, scores: dict[str, dict[str, float]], **more: Any) -> None:
        """Add one row to the result file."""
        content = load_json(self.out)
        others = {row["budget"] for row in content.get("rows", {}).values()} - {self.budget}
        if others:
            raise ValueError(f"{self.out} has rows of {', '.join(others)}; name another file with --out.")
        row = {"dice": scores, "budget": self.budget, "provenance": provenance(), **more}
        content.setdefault("rows", {})[name] = row
        save_json(content, self.out)
        print(f"{name}: " + ", ".join(f"{m} {np.mean(list(s.values())):.4f}" for m, s in scores.items()), flush=True)

    def test(self, name: str, model: Path, modalities: Sequence[str], *, told: bool, **others: Any) -> None:
        """Predict the test images of some modalities, told or guessed, score and record them."""
        scores = {}
        for modality in modalities:
            predictions = self.predict(model, modality, *(["--modality", modality] if told else []))
            scores[modality] = self.score(predictions, model, modality, labels_of(modality))
        settings = load_json(model / "plans.json").get(PLANS_KEY, {}).get("M4oETrainer", {})
        usage = load_json(model / "fold_0" / "expert_usage.json") if told else {}
        more = {key: usage[key] for key in ("told", "layers", "usage") if key in usage}
        self.record(
            name, scores,
            parameters=parameters(model / "fold_0" / FINAL),
            pretraining=settings["pretraining_trainer"] if settings.get("pretrained") else None,
            seconds_per_epoch=seconds_per_epoch(*(model / "fold_0").glob("training_log_*.txt")), **more, **others,
        )  # fmt: skip

    def changed_voxels(self, model: Path, base: Path, modality: str, *flags: str) -> int:
        """Of all test images of a modality, against the segmentations of another model."""
        one, other = (self.predict(m, modality, *flags) for m in (model, base))
        files = sorted(one.glob(f"*{FILE_ENDING}"))
        pairs = ([sitk.GetArrayFromImage(sitk.ReadImage(str(f / x.name))) for f in (one, other)] for x in files)
        return sum(int((a != b).sum()) for a, b in pairs)

    def per_dataset(self) -> None:
        """One nnU-Net for every source; each answers for the labels that it has learnt."""
        scores: dict[str, dict[str, float]] = {}
        for source in SOURCES:
            model = self.train(source.name, "nnUNetTrainer")
            found = self.score(self.predict(model, source.modality), model, source.modality, source.labels)
            scores.setdefault(source.modality, {}).update(found)
        self.record(PER_DATASET, scores)

    def merged(self, row: Row) -> Path:
        """One network for all sources."""
        variables = {}
        if row.pretraining is not None:
            stage = self.train(THREE, f"M4oEPretrainTrainer_{SIZE}{row.pretraining}", self.pretraining)
            variables["nnUNet_diffext_pretraining"] = str(stage)
        return self.train(THREE, row.trainer, **variables)

    def grown(self, trainer: str | None) -> Path:
        """The left atrium as a fourth modality of the trained M4oE; or all four modalities from scratch."""
        if trainer is not None and trainer.endswith("_noMAE"):
            return self.train(FOUR, trainer)
        model = self.merged(ROWS["M4oE"])
        larger = self.work / "larger" / model.name
        if not larger.is_dir():
            larger.parent.mkdir(exist_ok=True)
            command = ["nnunet_diffext", "add_modality", "-m", str(model), "-d", FOUR[7:10], "-o", str(larger)]
            run_command(command, self.env, self.work / "logs" / "add_modality.log")
        return larger if trainer is None else self.train(FOUR, trainer, nnUNet_diffext_pretraining=str(larger))

    def row(self, name: str) -> None:
        """Train, predict and score one row. M4oE is told the modality; by default it is also asked to tell it."""
        if name == PER_DATASET:
            self.per_dataset()
        elif name in GROWTH:
            self.growth_row(name, GROWTH[name])
        else:
            model, is_ours = self.merged(ROWS[name]), name.startswith("M4oE")
            self.test(name, model, MODALITIES, told=is_ours)
            if name == "M4oE":
                self.test(name + NOT_GIVEN, model, MODALITIES, told=False)

    def growth_row(self, name: str, trainer: str | None) -> None:
        """The same for a network that was grown: also how many voxels of the old modalities have changed."""
        model, tested = self.grown(trainer), [*MODALITIES, ATRIUM_MODALITY]
        if trainer is None:
            tested = tested[:-1]  # not to be asked before it is trained
        base = None if trainer is not None and trainer.endswith("_noMAE") else self.merged(ROWS["M4oE"])
        for told in (True, False):
            changed = {}
            for m in MODALITIES if base is not None else ():
                changed[m] = self.changed_voxels(model, base, m, *(["--modality", m] if told else []))
            self.test(name + ("" if told else NOT_GIVEN), model, tested, told=told, changed_voxels=changed)


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    columns = [*MODALITIES, ATRIUM_MODALITY]
    lines = ["| training | " + " | ".join(columns) + " | mean of the first three |", "|---" * (len(columns) + 2) + "|"]
    for name, row in content.get("rows", {}).items():
        means = {m: float(np.mean(list(labels.values()))) for m, labels in row["dice"].items()}
        cells = [f"{means[m]:.4f}" if m in means else "" for m in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {np.mean([means[m] for m in MODALITIES]):.4f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for data, results and logs")
    parser.add_argument("--data", type=Path, help="raw dataset folder Dataset910_LeftAtrium")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--pretraining_epochs", type=int, default=20, help="of phase 1")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1, help="of the trainings; another one needs another --out")
    parser.add_argument(
        "--rows", nargs="+", choices=[PER_DATASET, *ROWS, *GROWTH], metavar="ROW",
        help="default: all; those with a fourth modality need --data",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    args = parser.parse_args()
    if args.table:
        print(table(load_json(args.out)))
        return 0
    if args.work is None:
        parser.error("--work is needed, except with --table")
    rows = args.rows or [PER_DATASET, *ROWS, *(GROWTH if args.data is not None else ())]
    if args.data is None and any(row in GROWTH for row in rows):
        parser.error("rows with a fourth modality need --data")
    budgets = (args.epochs, args.pretraining_epochs, args.iters, args.seed)
    benchmark = Benchmark(args.work, *budgets, args.out, args.data and args.data.resolve())
    for row in rows:
        benchmark.row(row)
    print(table(load_json(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
