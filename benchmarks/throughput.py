"""Cost of DMEDSegTrainer next to nnUNetTrainer on the same plans: training step, inference pass, peak memory.

    python benchmarks/left_atrium.py --data .../Dataset910_LeftAtrium --work DIR --prepare-only
    python benchmarks/throughput.py --work DIR

Steps of the two trainers alternate in one process, on batches drawn beforehand, so that a busy machine slows both
alike; the median is reported. Inference is one forward pass of one patch without mirroring, again alternating: stock
nnU-Net, the whole DMED-Seg network, and each of its experts alone. Peak memory is that of a process per trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import load_json, save_json

from nnunet_diffext.demo.commands import nnunet_environment
from nnunet_diffext.evaluation.provenance import provenance

TRAINERS = ("nnUNetTrainer_1epochs_seed0", "DMEDSegTrainer_1epochs_seed0")
BATCHES = 4


def build(name: str, dataset: str, plans: str, device: str) -> tuple[Any, list[dict[str, Any]]]:
    """An initialised trainer on fold 0 and some of its batches, drawn without worker processes."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(dataset, "3d_fullres", 0, name, plans, device=torch.device(device))
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    trainer.network.train()
    return trainer, [next(loader) for _ in range(BATCHES)]


def interleaved(actions: dict[str, Callable[[int], Any]], rounds: int, warmup: int, device: str) -> dict[str, float]:
    """Median seconds of each action, called in turn with the number of the round; the first ``warmup`` do not count."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(warmup + rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action(index)
            if device == "cuda":
                torch.cuda.synchronize()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


class Step:
    """One training step of a trainer, for `interleaved`."""

    def __init__(self, trainer: Any, batches: list[dict[str, Any]]) -> None:
        self.trainer, self.batches = trainer, batches

    def __call__(self, index: int) -> None:
        """Train on one of the batches."""
        self.trainer.train_step(self.batches[index % len(self.batches)])


def inference_actions(stock: Any, dmed: Any, image: Any) -> dict[str, Callable[[int], Any]]:
    """Forward passes in eval mode: both complete networks and either expert alone."""
    import torch

    def passes(module: Callable[[Any], Any]) -> Callable[[int], Any]:
        def forward(_: int) -> None:
            with torch.inference_mode():
                module(image)

        return forward

    stock, dmed = stock.eval(), dmed.eval()
    noise = dmed.inference_noise(image)
    return {
        "nnU-Net": passes(stock),
        "DMED-Seg": passes(dmed),
        "convolutional expert": passes(dmed.ce),
        "diffusion expert": passes(lambda x: dmed.de_pass(x, noise)),
    }


def parameters(module: Any) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def measure(dataset: str, plans: str, device: str, steps: int) -> dict[str, Any]:
    """Times and sizes of both trainers, in this process."""
    built = {name: build(name, dataset, plans, device) for name in TRAINERS}
    stock, dmed = (built[name][0] for name in TRAINERS)
    train = interleaved({name: Step(*parts) for name, parts in built.items()}, steps, 3, device)
    image = built[TRAINERS[0]][1][0]["data"][:1].to(device)
    inference = interleaved(inference_actions(stock.network, dmed.network, image), 3 * steps, 3, device)
    return {
        "seconds_per_training_step": train,
        "seconds_per_inference_pass": inference,
        "parameters": {
            "nnU-Net": parameters(stock.network),
            "DMED-Seg": parameters(dmed.network),
            "convolutional expert": parameters(dmed.network.ce),
            "diffusion expert": parameters(dmed.network.de),
        },
        "patch_size": list(stock.configuration_manager.patch_size),
        "batch_size": stock.configuration_manager.batch_size,
    }


def peak_rss_mib() -> float:
    """Peak resident memory of this process in MiB.

    From /proc: getrusage's ru_maxrss starts, on Linux, at the peak of the process that started this one.
    """
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(name: str, dataset: str, plans: str, device: str) -> dict[str, float]:
    """MiB of this process (and of the GPU) after a few training steps, and before the trainer was built."""
    import nnunetv2.run.run_training  # noqa: F401 - what every nnU-Net process holds
    import torch

    before = peak_rss_mib()
    step = Step(*build(name, dataset, plans, device))
    for index in range(4):
        step(index)
    result = {"peak_rss_mib": round(peak_rss_mib()), "imports_rss_mib": round(before)}
    if device == "cuda":
        result["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return result


def peak_memory_of_child(name: str, arguments: list[str]) -> dict[str, float]:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--peak-of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that left_atrium.py --prepare-only filled")
    parser.add_argument("--dataset", default="910")
    parser.add_argument("--plans", default="nnUNetPlansQ")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as results:
        # nnU-Net reads its folders when it is imported; the trainers' logs do not belong to any result.
        os.environ.update(nnunet_environment(args.work) | {"nnUNet_results": results, "nnUNet_n_proc_DA": "0"})
        if args.peak_of:
            print(json.dumps(peak_memory(args.peak_of, args.dataset, args.plans, args.device)))
            return 0
        load = os.getloadavg()[0]
        entry = measure(args.dataset, args.plans, args.device, args.steps)
    shared = ["--work", str(args.work), "--dataset", args.dataset, "--plans", args.plans, "--device", args.device]
    entry["memory"] = {name: peak_memory_of_child(name, shared) for name in TRAINERS}
    command = "python benchmarks/throughput.py --work DIR " + " ".join(shared[2:] + ["--steps", str(args.steps)])
    entry |= {"command": command, "load_average_before": round(load, 2), **provenance()}
    save_json(load_json(args.out) | {args.device: entry}, args.out)
    print(json.dumps(entry, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
