"""Trainers without data on disk: nnU-Net's folders are empty, and belong to one test module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "networks"))

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture(autouse=True, scope="module")
def folders_of_this_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net writes its logs and checkpoints below this folder."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        yield root
