"""Tiny datasets, planned and preprocessed by nnU-Net, and one trained model that many tests look at."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from workspace import (  # noqa: E402
    FOLDERS,
    MAIN,
    TRAINER,
    Workspace,
    add_cascade,
    command,
    plan,
    preprocess,
    shrink,
    threads_instead_of_spawn,
    train,
)

from synthetic import make_raw_dataset  # noqa: E402


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """nnU-Net's folders, shared by all tests of this directory."""
    made = Workspace(tmp_path_factory.mktemp("e2e"))
    for name in FOLDERS:
        (made.root / name).mkdir()
    return made


@contextmanager
def active(workspace: Workspace) -> Iterator[None]:
    """Folders in the environment; what only costs time is made cheaper: processes are threads, plots are small."""
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in workspace.environment.items():
            patch.setenv(name, folder)
        patch.setattr(multiprocessing, "get_context", threads_instead_of_spawn)
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        patch.setitem(matplotlib.rcParams, "savefig.dpi", 10)
        yield


@pytest.fixture(autouse=True)
def environment(workspace: Workspace) -> Iterator[None]:
    """Every test runs in it."""
    with active(workspace):
        yield


@pytest.fixture(scope="session")
def main_dataset(workspace: Workspace) -> str:
    """Five labelled cases, two of which the split lists as unlabelled, and two images in ``imagesTu``."""
    make_raw_dataset(workspace.root / "nnUNet_raw", 801, "Main", cases=5, unlabeled=2, shape=(14, 16, 18))
    with active(workspace):
        file = plan(workspace, MAIN)
        shrink(file, (12, 12, 12))
        add_cascade(file)
        preprocess(MAIN, ["3d_fullres", "2d", "3d_lowres"], unlabeled=True)
    splits = [
        {"train": ["case_000", "case_001"], "val": ["case_004"], "unlabeled": ["case_002", "case_003"]},
        {"train": ["case_001", "case_004"], "val": ["case_000"], "unlabeled": ["case_002", "case_003"]},
    ]
    (file.parent / "splits_final.json").write_text(json.dumps(splits))
    return MAIN


@pytest.fixture(scope="session")
def trained(workspace: Workspace, main_dataset: str) -> Path:
    """Model folder of the main dataset: fold 0 by the stock command with ``--npz``, fold 1 in this process."""
    command(
        "nnUNetv2_train", "801", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu", "--npz",
        **workspace.environment,
    )  # fmt: skip
    with active(workspace):
        train(main_dataset, TRAINER, fold=1)
    return workspace.model(main_dataset, TRAINER)


@pytest.fixture
def own_workspace(
    workspace: Workspace, main_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A copy of the main dataset that a test may damage, without results."""
    own = Workspace(tmp_path / "own")
    shutil.copytree(workspace.root / "nnUNet_raw", own.root / "nnUNet_raw")
    shutil.copytree(workspace.preprocessed(main_dataset), own.preprocessed(main_dataset))
    (own.root / "nnUNet_results").mkdir()
    for name, folder in own.environment.items():
        monkeypatch.setenv(name, folder)
    return own


@pytest.fixture
def test_images(workspace: Workspace, main_dataset: str, tmp_path: Path) -> Path:
    """Two images to predict."""
    folder = tmp_path / "images"
    shutil.copytree(workspace.raw(main_dataset) / "imagesTu", folder)
    assert len(os.listdir(folder)) == 2
    return folder
