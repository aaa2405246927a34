"""Two processes train together, as ``nnUNetv2_train -num_gpus 2`` does, but with gloo on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddp_script import FULL, VARIANTS
from nnunetv2.run.run_training import find_free_network_port
from workspace import MAIN, Workspace, curves

Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(workspace: Workspace, main_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report."""
    folder, port = tmp_path_factory.mktemp("ddp"), str(find_free_network_port())
    script = str(Path(__file__).with_name("ddp_script.py"))
    processes = []
    for rank in ("0", "1"):
        command = [sys.executable, script, rank, "2", port, MAIN, str(folder / rank)]
        with open(folder / f"{rank}.log", "w") as log:
            environment = {**os.environ, **workspace.environment}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [p.wait(400) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    return tuple(json.loads((folder / rank).read_text()) for rank in ("0", "1"))


@pytest.mark.parametrize("name", ["full", *VARIANTS])
def test_ranks_agree(results: Results, name: str) -> None:
    one, other = (rank[name] for rank in results)
    assert one["parameters"] == other["parameters"]
    assert one["teacher"] == other["teacher"]
    assert one["bad_steps"] == other["bad_steps"] == 0
    assert np.isfinite([v for rank in (one, other) for step in rank["losses"] for v in step.values()]).all()
    assert one["losses"] != other["losses"], "the ranks should see different patches"
    if name != "full":
        assert sum(a != b for a, b in zip(one["before"], one["parameters"], strict=True)) > len(one["before"]) / 2


def test_rank_0_leaves_a_complete_model(results: Results, workspace: Workspace) -> None:
    assert [rank["full"]["batch_size"] for rank in results] == [1, 1]
    fold = workspace.model(MAIN, FULL) / "fold_0"
    logged = curves(fold / "checkpoint_final.pth")
    assert {len(v) for v in logged.values()} == {2}
    losses = np.array([[step["loss"] for step in rank["full"]["losses"]] for rank in results])
    np.testing.assert_allclose(logged["train_losses"], losses.reshape(2, 2, 2).mean(axis=(0, 2)), rtol=1e-5)
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 1
