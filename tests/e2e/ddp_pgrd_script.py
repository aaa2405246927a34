"""One rank of PGRD's distributed training: ``ddp_pgrd_script.py RANK WORLD_SIZE PORT DATASET OUTPUT``.

As in ``ddp_script.py``, only the device is replaced: nnU-Net takes for granted that DDP means CUDA and NCCL.
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
from ddp_script import checksum, on_cpu, report
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock
from workspace import CPU, make_trainer, threads_instead_of_spawn

FULL = "PGRDTrainer_2epochs_2iters_1valiters_seed5"
VARIANTS = ("noPGR", "noDDS", "vanillaDDPM", "x0_TOnly_hardPrior")


def keep_cpu(self: Any, *arguments: Any, **options: Any) -> None:
    """The base class has just chosen a GPU."""
    _plain_init(self, *arguments, **options)
    self.device, self.grad_scaler = CPU, None


def state(trainer: Any, steps: list[dict]) -> dict[str, Any]:
    """What two ranks compare."""
    net = trainer.module
    return {
        **report(trainer, steps),
        "scales": [float(net.kappa), float(net.spread)],
        "strength": trainer._strength,
        "prior": None if net.prior is None else checksum(net.prior.parameters()),
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
    return state(trainer, steps), batches


def a_few_steps(dataset: str, variant: str, batches: list[dict]) -> dict[str, Any]:
    """A parameter without gradient makes DDP fail in the second step."""
    trainer = make_trainer(dataset, f"PGRDTrainer_{variant}_2iters_seed3")
    trainer.initialize()
    trainer.network.train()
    return state(trainer, [trainer.train_step(batch) for batch in batches[:3]])


if __name__ == "__main__":
    rank, world_size, port, name, output = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world_size))
    _plain_init = stock.nnUNetTrainer.__init__
    stock.nnUNetTrainer.__init__ = keep_cpu
    stock.DDP = on_cpu
    multiprocessing.get_context = threads_instead_of_spawn
    results = {}
    results[FULL], used = full_training(name)
    for token in VARIANTS:
        results[token] = a_few_steps(name, token, used)
    Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
