"""What is said when predictions of different kinds would share a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_diffext.inference.output_folder import prepare_folder
from nnunet_diffext.inference.predictor import Predictor


def test_continuing_with_another_modality_or_prompt_is_said(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = Predictor(stock, (0,))
    prepare_folder(predictor, tmp_path, False, {"modality": "CT", "prompt": None})
    prepare_folder(predictor, tmp_path, True, {"modality": "CT", "prompt": None})
    assert capsys.readouterr().out == ""
    prepare_folder(predictor, tmp_path, True, {"modality": "MR", "prompt": ["liver=the liver"]})
    said = capsys.readouterr().out
    assert "modality CT (now MR), prompt None (now ['liver=the liver'])" in said
