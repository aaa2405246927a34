"""Two processes that train together, as ``nnUNetv2_train -num_gpus 2`` does, but with gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.run.run_training import find_free_network_port

Results = tuple[dict[str, Any], dict[str, Any]]
RANKS = ("0", "1")


def train_on_two_ranks(folder: Path, dataset: str, trainers: Sequence[str], environment: dict[str, str]) -> Results:
    """What the ranks of ``ddp_script.py`` report, by name of the trainer."""
    port, script = str(find_free_network_port()), str(Path(__file__).with_name("ddp_script.py"))
    processes = []
    for rank in RANKS:
        command = [sys.executable, script, rank, "2", port, str(folder / rank), dataset, *trainers]
        with open(folder / f"{rank}.log", "w") as log:
            env = {**os.environ, **environment}
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [p.wait(400) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in RANKS)
    return tuple(json.loads((folder / rank).read_text()) for rank in RANKS)


def check_ranks_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same network on both, after steps on different patches, and nothing trainable left as it was."""
    assert one["state"] == other["state"]
    assert one["state"]["bad_steps"] == 0
    assert np.isfinite([v for rank in (one, other) for step in rank["losses"] for v in step.values()]).all()
    assert one["losses"] != other["losses"], "the ranks should see different patches"
    if "before" in one:
        pairs = zip(one["before"], one["state"]["parameters"], one["trained"], strict=True)
        moved = [before != after for before, after, trained in pairs if trained]
        assert sum(moved) > len(moved) / 2
