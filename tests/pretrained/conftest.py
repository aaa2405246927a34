"""No test reaches a hub or sees what was downloaded before; ``tiny_models`` is importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from nnunet_diffext.pretrained import text, vision  # noqa: E402


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline with an empty cache, also where huggingface_hub was imported by another test before."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    monkeypatch.delenv(text.VARIABLE, raising=False)
    monkeypatch.delenv(vision.VARIABLE, raising=False)
