"""One rank of distributed trainings on the CPU: ``ddp_script.py RANK WORLD_SIZE PORT OUTPUT DATASET TRAINER ...``.

A trainer whose name tells its epochs is trained and validated by nnU-Net's loop; the others take three steps on the
batches of the one before. nnU-Net's trainer takes for granted that DDP means CUDA and NCCL: only the device is replaced
here. See ``ranks.py`` for what is compared.
"""

from __future__ import annotations

import itertools
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


def on_cpu(network: torch.nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    """DDP as nnU-Net makes it, but for the device."""
    return DistributedDataParallel(network)


def keep_cpu(self: Any, *arguments: Any, **options: Any) -> None:
    """The base class has just chosen a GPU."""
    _plain_init(self, *arguments, **options)
    self.device, self.grad_scaler = CPU, None


def checksum(tensors: Any) -> list[float]:
    """Sums that two ranks compare."""
    return [float(t.detach().double().sum()) for t in tensors]


def state_of(trainer: Any) -> dict[str, Any]:
    """What must be the same on all ranks."""
    projector = getattr(trainer, "projector", None)
    return {
        "parameters": checksum(trainer.module.parameters()),
        "buffers": checksum(trainer.module.buffers()),
        "teacher": None if trainer.teacher is None else checksum(trainer.teacher.parameters()),
        "projector": None if projector is None else checksum(projector.parameters()),
        "strength": getattr(trainer, "_strength", None),
        "bad_steps": trainer.bad_steps,
    }


def report(trainer: Any, steps: list[dict], **more: Any) -> dict[str, Any]:
    """Losses and state of this rank."""
    losses = [{k: float(v) for k, v in s.items()} for s in steps]
    return {"losses": losses, "state": state_of(trainer), "batch_size": trainer.batch_size, **more}


def full_training(dataset: str, name: str) -> tuple[dict[str, Any], list[dict]]:
    """Training and final validation by nnU-Net's loop; also the batches that it used."""
    trainer = make_trainer(dataset, name)
    steps, batches, plain = [], [], trainer.train_step

    def step(batch: dict) -> dict:
        batches.append(batch)
        steps.append(plain(batch))
        return steps[-1]

    trainer.train_step = step
    trainer.run_training()
    trainer.perform_actual_validation()
    return report(trainer, steps), batches


def deal(batches: list[dict], cases: list[str], first: int) -> list[dict]:
    """The patches under names of cases in turn: so few patches drawn at random may miss a case, and its modality."""
    names = itertools.islice(itertools.cycle(cases), first, None)
    return [{**batch, "keys": [next(names) for _ in batch["keys"]]} for batch in batches]


def a_few_steps(dataset: str, name: str, batches: list[dict]) -> dict[str, Any]:
    """A parameter without gradient makes DDP fail in the second step."""
    trainer = make_trainer(dataset, name)
    trainer.initialize()
    batches = deal(batches[:3], sorted(trainer.do_split()[0]), first=dist.get_rank())
    trained = [p.requires_grad for p in trainer.module.parameters()]
    before = checksum(trainer.module.parameters())
    trainer.network.train()
    steps = [trainer.train_step(batch) for batch in batches]
    return report(trainer, steps, before=before, trained=trained)


if __name__ == "__main__":
    rank, world_size, port, output, data, *names = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world_size))
    _plain_init = stock.nnUNetTrainer.__init__
    stock.nnUNetTrainer.__init__ = keep_cpu
    stock.DDP = on_cpu
    multiprocessing.get_context = threads_instead_of_spawn
    results, used = {}, []
    for name in names:
        if "epochs" in name:
            results[name], used = full_training(data, name)
        else:
            results[name] = a_few_steps(data, name, used)
    Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
