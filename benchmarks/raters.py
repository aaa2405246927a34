"""Calibration against a known truth: several raters, drawn from a distribution that the image determines.

    python benchmarks/raters.py --work DIR                # makes the data, trains and predicts everything
    python benchmarks/raters.py --table

The data are those of rater_data.py. Scores are those of the predicted probabilities against the known P(y | x) on
unseen volumes: the cross-entropy -E_P log q, what it exceeds the entropy of P by (the KL divergence), and the
calibration error.

Methods: the nnU-Net prior of one fold, with a temperature fitted on the fold's validation cases, Monte-Carlo dropout,
an ensemble of three seeds, and PGRDTrainer with and without its parts. All see the 48 training volumes of fold 0; the
out-of-fold priors of PGRD have also seen its 12 validation volumes, as the fitted temperature has.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from common import CONFIGURATION, PLANS, load_json, predict, save_json, temperature, train_fold
from rater_data import DATASET, FOLDS, prepare
from scipy.ndimage import binary_dilation
from scipy.special import entr

from nnunet_diffext.evaluation.cases import read_probabilities
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.files import FINAL

FLOOR = 1e-7  # of predicted probabilities inside the logarithm
PGRD_ROWS = {
    "PGRD": "",
    "PGRD noDDS": "_noDDS",
    "PGRD noPGR": "_noPGR",
    "vanilla DDPM": "_vanillaDDPM",
    "PGRD in-sample prior": "_insample",
    "PGRD corrupted prior": "_corrupted",
}


def band_of(truth: np.ndarray) -> np.ndarray:
    """Voxels within 3 of anything that some rater marks."""
    return binary_dilation(truth > 0, iterations=3)


def score(q: np.ndarray, truth: np.ndarray, bins: int = 15) -> dict[str, float]:
    """Predicted probabilities of the foreground against the true ones, in the band; float64."""
    q, p = q.astype(float), truth.astype(float)
    log_q, log_not_q = np.log(np.clip(q, FLOOR, 1)), np.log(np.clip(1 - q, FLOOR, 1))
    entropy = entr(p) + entr(1 - p)
    cross = -(p * log_q + (1 - p) * log_not_q)
    confidence, right = np.maximum(q, 1 - q), np.where(q >= 0.5, p, 1 - p)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[index == b].sum()) for b in range(bins)]
    return {
        "nll": float(cross.mean()),
        "kl": float((cross - entropy).mean()),
        "ece": float(sum(gaps) / q.size),
        "rmse": float(np.sqrt(((q - p) ** 2).mean())),
    }


def dice(q: np.ndarray, mask: np.ndarray) -> float:
    """Of the decision at 0.5 with one rater."""
    a, b = q > 0.5, mask > 0
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def evaluate(probabilities: dict[str, np.ndarray], raw: Path, group: str = "Ts") -> dict[str, Any]:
    """Mean over cases; ``probabilities`` maps cases to foreground probabilities."""
    rows = []
    for case, q in sorted(probabilities.items()):
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / f"truth{group}" / f"{case}.nii.gz")))
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / f"labels{group}" / f"{case}.nii.gz")))
        band = band_of(truth)
        rows.append({**score(q[band], truth[band]), "dice": dice(q, mask), "dice_truth": dice(q, truth > 0.5)})
    return {key: float(np.mean([r[key] for r in rows])) for key in rows[0]} | {"cases": len(rows), "per_case": rows}


class Benchmark:
    """Trains, predicts and scores; what is finished is not repeated."""

    def __init__(self, work: Path, epochs: int, iterations: int, out: Path) -> None:
        self.work, self.out, self.logs = work, out, work / "logs"
        self.budget = f"{epochs}epochs_{iterations}iters_2valiters"
        self.env = prepare(work)
        self.raw = Path(self.env["nnUNet_raw"]) / DATASET
        self.results = Path(self.env["nnUNet_results"]) / DATASET

    def prior(self, seed: int = 1) -> str:
        """Trainer name of the stock nnU-Net."""
        return f"nnUNetTrainer_{self.budget}_seed{seed}"

    def train(self, trainer: str, fold: int = 0, plans: str = PLANS) -> Path:
        """One training around the prior of seed 1, if it needs one; returns the model folder."""
        prior = str(self.results / f"{self.prior()}__{PLANS}__{CONFIGURATION}")
        return train_fold(DATASET, trainer, self.env, self.logs, fold, plans, nnUNet_diffext_prior=prior)

    def predict(self, name: str, model: Path, *flags: str, images: str = "imagesTs") -> dict[str, np.ndarray]:
        """Foreground probabilities of the test cases, through ``nnunet_diffext predict`` without mirroring."""
        out = self.work / "predictions" / name.replace(" ", "_")
        predict(self.raw / images, out, model, 0, self.env, self.logs, "--save_probabilities", *flags)
        return {f.stem: read_probabilities(f)[1] for f in sorted(out.glob("*.npz"))}

    def record(self, name: str, probabilities: dict[str, np.ndarray], **more: Any) -> None:
        """Add one row to the result file."""
        content = load_json(self.out)
        scores = evaluate(probabilities, self.raw)
        content.setdefault("rows", {})[name] = scores | more | {"provenance": provenance()}
        save_json(content, self.out)
        print(f"{name}: " + ", ".join(f"{k} {scores[k]:.4f}" for k in ("nll", "kl", "ece", "dice")), flush=True)

    def baselines(self) -> None:
        """The prior, with temperature, ensemble, MC dropout."""
        model = self.train(self.prior())
        self.record("nnU-Net", self.predict("prior", model, "--no_temperature"))
        fitted = temperature(model, 0, self.env, self.logs)
        self.record("nnU-Net + temperature", self.predict("prior_T", model), temperature=fitted)
        members = [self.predict(f"seed{s}", self.train(self.prior(s)), "--no_temperature") for s in (1, 2, 3)]
        self.record("ensemble of 3", {c: np.mean([m[c] for m in members], axis=0) for c in members[0]})
        dropout = self.train(self.prior(), plans=f"{PLANS}Dropout")
        self.record("MC dropout, 16 passes", mc_dropout(dropout, self.raw, self.env, passes=16))

    def pgrd(self, rows: list[str], tokens: str) -> None:
        """PGRD and its ablations around the prior of fold 0, out-of-fold priors from the other folds."""
        for fold in range(FOLDS):
            self.train(self.prior(), fold)
        for name in rows:
            trainer = f"PGRDTrainer{PGRD_ROWS[name]}{tokens}_{self.budget}_seed1"
            model, name = self.train(trainer), name + tokens
            for steps, samples in ((1, 1), (10, 4), (10, 16)):
                flags = ["--no_temperature"]
                if steps > 1:
                    flags += ["-steps", str(steps), "-samples", str(samples)]
                    flags += ["-sampler", "ddpm" if "DDPM" in name else "ddim"]
                elif "DDPM" in name:
                    continue  # one step from pure noise is undefined for noise prediction
                else:
                    flags += ["-samples", "0"]
                label = f"{name}, one step" if steps == 1 else f"{name}, {steps} steps x {samples}"
                self.record(label, self.predict(label.replace(",", ""), model, *flags), trainer=trainer)


def mc_dropout(model: Path, raw: Path, env: dict[str, str], passes: int) -> dict[str, np.ndarray]:
    """Mean probability over stochastic passes. The volume is one tile, its preprocessing one normalisation."""
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    os.environ.update(env)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), FINAL)
    network = predictor.network
    network.load_state_dict(predictor.list_of_parameters[0])
    network.eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout3d):
            module.train()
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    torch.manual_seed(0)
    result = {}
    for file in sorted((raw / "imagesTs").glob("*.nii.gz")):
        image, properties = SimpleITKIO().read_images([str(file)])
        data, _, _ = preprocessor.run_case_npy(
            image, None, properties, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        with torch.inference_mode():
            x = torch.from_numpy(np.asarray(data))[None].float()
            p = torch.stack([network(x).softmax(1)[0, 1] for _ in range(passes)]).mean(0)
        result[file.name[: -len("_0000.nii.gz")]] = p.numpy()
    return result


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| method | NLL against P | KL | ECE | RMSE | Dice with a rater | Dice with P > 0.5 |", "|---" * 7 + "|"]
    for name, r in content.get("rows", {}).items():
        values = [f"{r[k]:.4f}" for k in ("nll", "kl", "ece", "rmse", "dice", "dice_truth")]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for data, results and logs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--rows", nargs="*", choices=list(PGRD_ROWS), default=list(PGRD_ROWS), help="which PGRD rows")
    parser.add_argument("--tokens", default="", help="more tokens for PGRD, such as _lr1e-3; they name the rows, too")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    args = parser.parse_args()
    if args.table:
        print(table(load_json(args.out)))
        return 0
    if args.work is None:
        parser.error("--work is needed, except with --table")
    benchmark = Benchmark(args.work, args.epochs, args.iters, args.out)
    if not args.no_baselines:
        benchmark.baselines()
    benchmark.pgrd(args.rows, args.tokens)
    print(table(load_json(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
