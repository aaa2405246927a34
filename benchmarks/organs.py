"""LEAF and TextDiffSeg on the demo's organs and their small lesion: does the text do anything, how stable is one step?

    python benchmarks/organs.py --work DIR [--text-encoder FOLDER] [--rows TextDiffSeg "LEAF, x0"]
    python benchmarks/organs.py --table

The same patch, batch and number of iterations for every training, 24 volumes for training, 20 for the test. The
autoencoder of LEAF comes on top; how well unseen labels come out of its latents (Dice on a few patches) tells what LEAF
can reach at best. Prompts are encoded by --text-encoder, else by a small BERT with random weights: its states differ
between prompts, but know no language. The rows with other prompts at prediction tell whether the trained network reads
them. Ten predictions from different noise per LEAF (paper's Table 4).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import load_json, predict, prepare_dataset, save_json, shrink, train_fold

from nnunet_diffext.data.prompts import prompts_for
from nnunet_diffext.demo.commands import nnunet_environment
from nnunet_diffext.demo.synthetic import LABELS, write_dataset
from nnunet_diffext.evaluation.folder import by_name, evaluate_predictions
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.files import RECONSTRUCTION

DATASET = "Dataset951_Organs"
TRAIN, VAL, TEST = 24, 4, 20
LATENTS = "stride4"  # (2, 4, 4) voxels: the lesion is 3 to 5 voxels wide
AUTOENCODER = f"MaskAutoencoderTrainer_{LATENTS}"
ROWS = {
    "nnU-Net": "nnUNetTrainer",
    "TextDiffSeg": f"TextDiffSegTrainer_{LATENTS}",
    "TextDiffSeg, randomText": f"TextDiffSegTrainer_{LATENTS}_randomText",
    "TextDiffSeg, singleVector": f"TextDiffSegTrainer_{LATENTS}_singleVector",
    "LEAF, x0": "LEAFTrainer_noAlign",
    "LEAF, v": "LEAFTrainer_noAlign_v",
    "LEAF, eps": "LEAFTrainer_noAlign_eps",
}
ORGANS = [name for name in LABELS if name != "background"]
SEEDS = range(1, 11)


def save_untrained_bert(folder: Path, texts: list[str]) -> None:
    """A BERT of two layers with random weights, and a vocabulary of the words of ``texts``."""
    from transformers import BertConfig, BertModel

    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")


class Benchmark:
    """Trains, predicts and scores; trainings that are finished are not repeated."""

    def __init__(self, work: Path, epochs: int, iterations: int, out: Path, text_encoder: Path | None = None) -> None:
        self.work, self.out, self.logs = work, out, work / "logs"
        self.budget = f"{epochs}epochs_{iterations}iters_2valiters_seed1"
        self.env = nnunet_environment(work, num_processes=1)
        self.raw = Path(self.env["nnUNet_raw"]) / DATASET
        if not (self.raw / "dataset.json").is_file():
            write_dataset(self.raw, TRAIN + VAL, 0, TEST, seed=9)
        folder = prepare_dataset(
            DATASET, self.env, self.logs,
            lambda plans: shrink(plans, (16, 48, 48), (16, 32, 64, 128), ([1] * 3, [1, 2, 2], [2] * 3, [2] * 3)),
        )  # fmt: skip
        cases = [f"train_{i:03d}" for i in range(TRAIN + VAL)]
        save_json([{"train": cases[:TRAIN], "val": cases[TRAIN:]}], folder / "splits_final.json")
        self.prompts = prompts_for(load_json(self.raw / "dataset.json"))
        self.env["nnUNet_diffext_text_encoder"] = str(text_encoder or work / "bert")
        if text_encoder is None and not (work / "bert" / "vocab.txt").is_file():
            save_untrained_bert(work / "bert", [*self.prompts.values()])

    def train(self, trainer: str) -> Path:
        """One training, on the autoencoder if it needs one; returns the model folder."""
        variables = {}
        if trainer.startswith("LEAF"):
            codec = self.train(AUTOENCODER)
            variables["nnUNet_diffext_codec"] = str(codec)
            found = load_json(codec / "fold_0" / "validation" / RECONSTRUCTION)["dice"]
            self.record("autoencoder alone, patches of the validation volumes", {"dice": found})
        return train_fold(DATASET, f"{trainer}_{self.budget}", self.env, self.logs, **variables)

    def score(self, name: str, model: Path, *flags: str) -> dict[str, float]:
        """Mean Dice per organ of the test images."""
        out = self.work / "predictions" / name.replace(" ", "_").replace(",", "")
        predict(self.raw / "imagesTs", out, model, 0, self.env, self.logs, *flags)
        result = evaluate_predictions(out, self.raw / "labelsTs", num_processes=1)
        if result.problems():
            raise ValueError("\n".join(result.problems()))
        means = by_name(result.report)["mean"]
        return {organ: means[organ]["dice"] for organ in ORGANS}

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Add one row to the result file."""
        content = load_json(self.out)
        content.setdefault("rows", {})[name] = row | {"provenance": provenance()}
        save_json(content, self.out)
        print(f"{name}: {row}", flush=True)

    def row(self, name: str) -> None:
        """One training and its predictions."""
        model = self.train(ROWS[name])
        self.record(name, {"dice": self.score(name, model), "trainer": model.name})
        if name == "TextDiffSeg":
            for title, changes in self.other_prompts().items():
                flags = [part for label, text in changes.items() for part in ("--prompt", f"{label}={text}")]
                self.record(f"{name}, {title}", {"dice": self.score(f"{name} {title}", model, *flags)})
        if name.startswith("LEAF"):
            self.record(f"{name}, ten seeds", self.ten_seeds(name, model))

    def other_prompts(self) -> dict[str, dict[str, str]]:
        """What the prompts are replaced by at prediction."""
        first = next(iter(self.prompts.values()))
        return {
            "all prompts the first label's": dict.fromkeys(self.prompts, first),
            "all prompts unknown words": dict.fromkeys(self.prompts, "something else"),
        }

    def ten_seeds(self, name: str, model: Path) -> dict[str, Any]:
        """Mean Dice per seed of the noise that one step starts from."""
        found = [
            statistics.mean(self.score(f"{name} seed", model, "-samples", "1", "-steps", "1", "-seed", str(s)).values())
            for s in SEEDS
        ]
        return {"mean_dice_per_seed": found, "mean": statistics.mean(found), "sd": statistics.stdev(found)}


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join([*ORGANS, "mean"]) + " |", "|---" * (len(ORGANS) + 2) + "|"]
    for name, row in content.get("rows", {}).items():
        if "dice" in row:
            values = [row["dice"][organ] for organ in ORGANS]
            lines.append(f"| {name} | " + " | ".join(f"{v:.4f}" for v in [*values, statistics.mean(values)]) + " |")
    lines += ["", "| from ten noises | mean Dice | standard deviation |", "|---|---|---|"]
    for name, row in content.get("rows", {}).items():
        if "sd" in row:
            lines.append(f"| {name} | {row['mean']:.4f} | {row['sd']:.5f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for data, results and logs")
    parser.add_argument("--text-encoder", type=Path, help="folder of a trained encoder that transformers can load")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="only print the tables of --out")
    args = parser.parse_args()
    if args.table:
        print(table(load_json(args.out)))
        return 0
    if args.work is None:
        parser.error("--work is needed, except with --table")
    benchmark = Benchmark(args.work.resolve(), args.epochs, args.iters, args.out, args.text_encoder)
    for name in args.rows:
        benchmark.row(name)
    print(table(load_json(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
