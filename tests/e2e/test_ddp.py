"""Two processes train DMED-Seg together."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ranks import Results, check_ranks_agree, train_on_two_ranks
from workspace import MAIN, Workspace, curves

FULL = "DMEDSegTrainer_2epochs_2iters_1valiters_save1"
VARIANTS = (
    "noCACL", "IEFA", "eq4", "CEonly", "DEonly", "fixedAverage", "paper", "halfDE", "TOnly", "noCopyPaste",
    "recycle", "leaky", "eq4_featuresOnly_TOnly", "noCACL_TOnly_eq4", "iefaUncertain_oneDirection",
)  # fmt: skip
NAMES = [f"DMEDSegTrainer_{variant}_2iters_seed3" for variant in VARIANTS]


@pytest.fixture(scope="module")
def results(workspace: Workspace, main_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks report."""
    return train_on_two_ranks(tmp_path_factory.mktemp("ddp"), MAIN, (FULL, *NAMES), workspace.environment)


@pytest.mark.parametrize("name", [FULL, *NAMES])
def test_ranks_agree(results: Results, name: str) -> None:
    check_ranks_agree(*(rank[name] for rank in results))


def test_rank_0_leaves_a_complete_model(results: Results, workspace: Workspace) -> None:
    assert [rank[FULL]["batch_size"] for rank in results] == [1, 1]
    fold = workspace.model(MAIN, FULL) / "fold_0"
    logged = curves(fold / "checkpoint_final.pth")
    assert {len(v) for v in logged.values()} == {2}
    losses = np.array([[step["loss"] for step in rank[FULL]["losses"]] for rank in results])
    np.testing.assert_allclose(logged["train_losses"], losses.reshape(2, 2, 2).mean(axis=(0, 2)), rtol=1e-5)
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 1
