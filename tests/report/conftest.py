"""Makes the helpers of this folder and ``synthetic`` importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from reported import Studio  # noqa: E402


@pytest.fixture
def studio(tmp_path: Path, nnunet_folders: dict[str, Path]) -> Studio:
    """A raw and preprocessed dataset of four cases with two structures; models are made on demand."""
    return Studio(nnunet_folders["nnUNet_raw"], nnunet_folders["nnUNet_preprocessed"], nnunet_folders["nnUNet_results"])


@pytest.fixture(scope="session", autouse=True)
def monai_is_loaded() -> None:
    """Importing MONAI takes seconds: once, and in no test's time."""
    import monai.metrics  # noqa: F401
