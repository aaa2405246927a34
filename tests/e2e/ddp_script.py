"""One rank of a distributed training on the CPU: ``ddp_script.py RANK WORLD_SIZE PORT DATASET OUTPUT``.

nnU-Net's trainer takes for granted that DDP means CUDA and NCCL. Only the device is replaced here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock
from torch.nn.parallel import DistributedDataParallel
from workspace import CPU, make_trainer, threads_instead_of_spawn

from nnunet_diffext.trainers import find_trainer
from nnunet_diffext.trainers.configured import ConfiguredTrainer

FULL = "DMEDSegTrainer_2epochs_2iters_1valiters_save1"
VARIANTS = (
    "noCACL", "IEFA", "eq4", "CEonly", "DEonly", "fixedAverage", "paper", "halfDE", "TOnly", "noCopyPaste",
    "recycle", "leaky", "eq4_featuresOnly_TOnly", "noCACL_TOnly_eq4", "iefaUncertain_oneDirection",
)  # fmt: skip


def on_cpu(network: torch.nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    """DDP as nnU-Net makes it, but for the device."""
    return DistributedDataParallel(network)


def keep_cpu(self: Any, *arguments: Any, **options: Any) -> None:
    """The base class has just chosen a GPU."""
    _plain_init(self, *arguments, **options)
    self.device, self.grad_scaler = CPU, None


def checksum(parameters: Any) -> list[float]:
    """Sums that two ranks compare."""
    return [float(p.detach().double().sum()) for p in parameters]


def report(trainer: Any, steps: list[dict]) -> dict[str, Any]:
    """Losses and state of this rank."""
    teacher = trainer.teacher
    return {
        "losses": [{k: float(v) for k, v in s.items()} for s in steps],
        "parameters": checksum(trainer.module.parameters()),
        "teacher": checksum(teacher.parameters()) if teacher is not None else None,
        "bad_steps": trainer.bad_steps,
    }


def full_training(dataset: str) -> tuple[dict[str, Any], list[dict]]:
    """Training and final validation by nnU-Net's loop; also the batches that it used."""
    trainer = make_trainer(dataset, FULL)
    steps, batches, plain = [], [], trainer.train_step

    def step(batch: dict) -> dict:
        batches.append(batch)
        steps.append(plain(batch))
        return steps[-1]

    trainer.train_step = step
    trainer.run_training()
    trainer.perform_actual_validation()
    return {**report(trainer, steps), "batch_size": trainer.batch_size}, batches


def a_few_steps(dataset: str, variant: str, batches: list[dict]) -> dict[str, Any]:
    """A parameter without gradient makes DDP fail in the second step."""
    trainer = make_trainer(dataset, f"DMEDSegTrainer_{variant}_2iters_seed3")
    trainer.initialize()
    before = checksum(trainer.module.parameters())
    trainer.network.train()
    steps = [trainer.train_step(batch) for batch in batches[:3]]
    return {**report(trainer, steps), "before": before}


if __name__ == "__main__":
    rank, world_size, port, name, output = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world_size))
    _plain_init = stock.nnUNetTrainer.__init__
    stock.nnUNetTrainer.__init__ = keep_cpu
    stock.DDP = on_cpu
    multiprocessing.get_context = threads_instead_of_spawn
    assert issubclass(find_trainer("DMEDSegTrainer"), ConfiguredTrainer)
    results = {}
    results["full"], used = full_training(name)
    for token in VARIANTS:
        results[token] = a_few_steps(name, token, used)
    Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
