"""Tiny model folders and images."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from models import THREE, make_model  # noqa: E402

from synthetic import make_raw_dataset  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net also finds the trainer whose network samples."""
    paths = [os.environ["nnUNet_extTrainer"], str(HERE / "ext")]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(paths))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases of 20 x 24 x 24 voxels with three labels."""
    root = tmp_path_factory.mktemp("raw")
    return make_raw_dataset(root, 871, "Predict", cases=5, shape=(20, 24, 24), labels=THREE)


@pytest.fixture(scope="session")
def images(raw: Path) -> Path:
    return raw / "imagesTr"


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock network, three labels, two folds, mirroring along two axes. Not to be changed."""
    return make_model(tmp_path_factory.mktemp("stock"), labels=THREE, folds=(0, 1), mirror=(0, 2))


@pytest.fixture
def sampling(tmp_path: Path) -> Path:
    """A network that samples, two folds, mirroring along two axes."""
    return make_model(
        tmp_path / "sampling", labels=THREE, trainer="TinySamplingTrainer", folds=(0, 1), mirror=(0, 2), sharpness=2
    )


@pytest.fixture
def two(images: Path, tmp_path: Path) -> Path:
    """Two cases."""
    folder = tmp_path / "in"
    folder.mkdir()
    for case in ("case_000", "case_001"):
        shutil.copy(images / f"{case}_0000.nii.gz", folder)
    return folder
