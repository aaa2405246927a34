"""Environment of the tests. Set while this file is imported: nnU-Net reads some of it when it is imported itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from nnunet_diffext.cli.trainer_dir import trainer_directory

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

# No test may ever touch the user's own data: what is set outside is replaced.
_root = tempfile.TemporaryDirectory(prefix="nnunet_diffext_tests_")
for _name in FOLDERS:
    os.environ[_name] = str(Path(_root.name) / _name)
    os.mkdir(os.environ[_name])
os.environ.update(
    nnUNet_extTrainer=str(trainer_directory()),
    nnUNet_n_proc_DA="1",
    nnUNet_def_n_proc="1",
    nnUNet_compile="f",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    MPLBACKEND="Agg",
)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty nnU-Net folders of this test alone, by the name of their variable."""
    folders = {name: tmp_path / name for name in FOLDERS}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders
