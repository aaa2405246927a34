"""Cost of every method next to nnU-Net on the same plans: training step, prediction of a tile, parameters, memory.

    python benchmarks/left_atrium.py --data .../Dataset910_LeftAtrium --work DIR --prepare-only
    python benchmarks/throughput.py --work DIR

Steps of all trainers alternate in one process, so that a busy machine slows them alike; medians are reported, and only
their ratios mean anything. Training steps run on random batches of the planned size (DMED-Seg with as many unlabelled
patches). Prediction is one forward pass of one patch without mirroring. PGRD's prior is the planned U-Net, LEAF has no
teacher, TextDiffSeg random text. Peak memory is that of a process per trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import load_json, save_json

from nnunet_diffext.demo.commands import nnunet_environment
from nnunet_diffext.evaluation.provenance import provenance

STOCK = "nnU-Net"
METHODS = {
    "DMED-Seg": "DMEDSegTrainer",
    "PGRD": "PGRDTrainer",
    "mask autoencoder": "MaskAutoencoderTrainer",
    "LEAF": "LEAFTrainer_noAlign",
    "TextDiffSeg": "TextDiffSegTrainer_randomText",
    "M4oE, three experts": "M4oETrainer",
    "M4oE, top1 of three": "M4oETrainer_top1",
    "M4oE, plain MLPs": "M4oETrainer_woMoE",
}
CONFIGURATION = "3d_fullres"


class Stock:
    """nnU-Net's own trainer on random batches; needs the preprocessed dataset, for its splits."""

    def __init__(self, dataset: str, plans: str, device: str) -> None:
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args

        name = "nnUNetTrainer_1epochs_seed0"
        self.trainer = get_trainer_from_args(dataset, CONFIGURATION, 0, name, plans, device=torch.device(device))
        self.trainer.initialize()
        self.network = self.trainer.network.train()
        c = self.trainer.configuration_manager
        self.patch, self.batch_size = list(c.patch_size), c.batch_size
        shape = (self.batch_size, 1, *self.patch)
        scales = self.trainer._get_deep_supervision_scales() or [[1.0] * len(self.patch)]
        sizes = [[round(p * s) for p, s in zip(self.patch, scale, strict=True)] for scale in scales]
        self.batch = {
            "data": torch.randn(shape, device=device),
            "target": [torch.randint(2, (self.batch_size, 1, *size)) for size in sizes],
        }

    def train(self) -> None:
        """One training step."""
        self.trainer.train_step(dict(self.batch))


def dry_run(name: str, work: Path, dataset: str, plans: str, device: str) -> Any:
    """The real training step of a method, without dataset or stages."""
    import torch

    from nnunet_diffext.planners.dry_run import DryRun
    from nnunet_diffext.trainers import find_trainer

    folder = next((work / "nnUNet_preprocessed").glob(f"Dataset{int(dataset):03d}_*"))
    content = load_json(folder / f"{plans}.json"), load_json(folder / "dataset.json")
    return DryRun(find_trainer(name), content[0], CONFIGURATION, content[1], torch.device(device))


def interleaved(actions: dict[str, Callable[[], Any]], rounds: int, warmup: int, device: str) -> dict[str, float]:
    """Median seconds of each action, called in turn; the first ``warmup`` rounds do not count."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(warmup + rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def predictions(built: dict[str, Any], image: Any) -> dict[str, Callable[[], Any]]:
    """Forward passes in eval mode: complete networks, DMED-Seg's experts alone, PGRD with samples."""
    import torch

    def passes(forward: Callable[[Any], Any]) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                forward(image)

        return run

    networks = {name: step.network.eval() for name, step in built.items()}
    actions = {name: passes(network) for name, network in networks.items() if name != "mask autoencoder"}
    if "DMED-Seg" in networks:
        dmed = networks["DMED-Seg"]
        noise = dmed.inference_noise(image)
        actions["DMED-Seg's convolutional expert"] = passes(dmed.ce)
        actions["DMED-Seg's diffusion expert"] = passes(lambda x: dmed.de_pass(x, noise))
    if "PGRD" in networks:
        pgrd = networks["PGRD"]
        actions["PGRD's prior"] = passes(pgrd.prior)

        def sampled(x: Any) -> None:
            one_step = pgrd.sampling
            pgrd.sampling = replace(one_step, steps=10, samples=4)
            pgrd(x)
            pgrd.sampling = one_step

        actions["PGRD, 10 steps x 4"] = passes(sampled)
    return actions


def measure(methods: list[str], work: Path, dataset: str, plans: str, device: str, steps: int) -> dict[str, Any]:
    """Times and sizes of some methods and nnU-Net, in this process."""
    import torch

    stock = Stock(dataset, plans, device)
    built = {STOCK: stock} | {name: dry_run(METHODS[name], work, dataset, plans, device) for name in methods}
    train = interleaved({name: step.train for name, step in built.items()}, steps, 3, device)
    image = torch.randn(1, 1, *stock.patch, device=device)
    predict = interleaved(predictions(built, image), steps, 3, device)
    sizes = {name: sum(p.numel() for p in step.network.parameters()) for name, step in built.items()}
    return {
        "seconds_per_training_step": train,
        "seconds_per_prediction": predict,
        "parameters": sizes,
        "patch_size": stock.patch,
        "batch_size": stock.batch_size,
    }


def peak_rss_mib() -> float:
    """Peak resident memory of this process in MiB.

    From /proc: getrusage's ru_maxrss starts, on Linux, at the peak of the process that started this one.
    """
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(name: str, work: Path, dataset: str, plans: str, device: str) -> dict[str, float]:
    """MiB of this process (and of the GPU) after a few training steps, and before the trainer was built."""
    import nnunetv2.run.run_training  # noqa: F401 - what every nnU-Net process holds
    import torch

    before = peak_rss_mib()
    step = Stock(dataset, plans, device) if name == STOCK else dry_run(METHODS[name], work, dataset, plans, device)
    for _ in range(4):
        step.train()
    result = {"peak_rss_mib": round(peak_rss_mib()), "imports_rss_mib": round(before)}
    if device == "cuda":
        result["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return result


def peak_memory_of_child(name: str, arguments: list[str]) -> dict[str, float]:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--peak-of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def table(entry: dict[str, Any]) -> str:
    """Markdown, relative to nnU-Net."""
    train, predict, sizes = (entry[k] for k in ("seconds_per_training_step", "seconds_per_prediction", "parameters"))
    lines = ["| | training step | prediction of a tile | parameters | peak memory |", "|---" * 5 + "|"]
    for name in dict.fromkeys([*train, *predict]):
        ratios = [f"{v[name] / v[STOCK]:.2f}x" if name in v else "" for v in (train, predict)]
        size = f"{sizes[name] / 1e6:.2f} M" if name in sizes else ""
        memory = entry["memory"].get(name)
        peak = f"{memory['peak_rss_mib'] - memory['imports_rss_mib']} MiB" if memory else ""
        lines.append(f"| {name} | " + " | ".join([*ratios, size, peak]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder that left_atrium.py --prepare-only filled")
    parser.add_argument("--dataset", default="910")
    parser.add_argument("--plans", default="nnUNetPlansQ")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*METHODS],
        choices=METHODS,
        metavar="METHOD",
        help="next to nnU-Net; default: all",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(f"{device}:\n\n{table(entry)}" for device, entry in load_json(args.out).items()))
        return 0
    if args.work is None:
        parser.error("--work is needed, except with --table")
    with tempfile.TemporaryDirectory() as results:
        # nnU-Net reads its folders when it is imported; the trainers' logs do not belong to any result.
        os.environ.update(nnunet_environment(args.work) | {"nnUNet_results": results, "nnUNet_n_proc_DA": "0"})
        where = (args.work, args.dataset, args.plans, args.device)
        if args.peak_of:
            print(json.dumps(peak_memory(args.peak_of, *where)))
            return 0
        load = os.getloadavg()[0]
        entry = measure(args.methods, *where, args.steps)
    shared = ["--work", str(args.work), "--dataset", args.dataset, "--plans", args.plans, "--device", args.device]
    entry["memory"] = {name: peak_memory_of_child(name, shared) for name in (STOCK, *args.methods)}
    chosen = [] if args.methods == [*METHODS] else ["--methods", *args.methods]
    arguments = [*shared[2:], "--steps", str(args.steps), *chosen]
    command = "python benchmarks/throughput.py --work DIR " + shlex.join(arguments)
    entry |= {"command": command, "load_average_before": round(load, 2), **provenance()}
    save_json(load_json(args.out) | {args.device: entry}, args.out)
    print(table(entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
