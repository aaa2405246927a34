"""``nnunet_diffext prompts --check``; what the verb prints without is tested with the prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_bert

from nnunet_diffext.cli.main import main
from nnunet_diffext.pretrained.text import VARIABLE


@pytest.fixture
def bert(tmp_path: Path, nnunet_folders: dict[str, Path]) -> Path:
    """An encoder for 12 tokens, and the dataset 953."""
    folder = nnunet_folders["nnUNet_raw"] / "Dataset953_Check"
    folder.mkdir()
    labels = {"background": 0, "liver": 1, "left_kidneys": 2}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "CT"}}))
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


def test_counts(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "-d", "953", "--check", "--encoder", str(bert)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"The text encoder {bert} takes 12 tokens:")
    assert lines[start + 1 :] == [
        "  liver: 7",
        "  left_kidneys: 9",
        "All prompts are encoded: up to 9 tokens with 16 features each.",
    ]


def test_too_long(bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (bert / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8}))
    monkeypatch.setenv(VARIABLE, str(bert))
    assert main(["prompts", "-d", "953", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["  liver: 7", "  left_kidneys: 9 (too long, shorten it)"]


def test_encoder_is_not_loaded_unasked(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "-d", "953"]) == 0
    assert main(["prompts", "-d", "953", "--encoder", "nobody/nothing"]) == 1
    assert "randomText" in capsys.readouterr().err
