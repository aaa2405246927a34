"""Maps of DMED-Seg's experts, on the same sliding window as every other prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import THREE, make_model

from nnunet_diffext.inference.experts import expert_maps
from nnunet_diffext.inference.predictor import Predictor

LABELS = {"diffext": {"label_space": {"num_heads": 3, "regions": False, "ignore_label": None}}}


def test_the_fused_expert_is_the_prediction(images: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path, labels=THREE, trainer="DMEDSegTrainer", mirror=(0, 2), more_plans=LABELS, sharpness=4)
    file = str(images / "case_000_0000.nii.gz")
    maps = expert_maps(folder, [file], fold=0)
    shape = maps["image"].shape[1:]
    for name in ("fused", "de", "ce"):
        assert maps[name].shape == (3, *shape)
        np.testing.assert_allclose(maps[name].sum(0), 1, atol=1e-5)
    assert maps["weight_de"].shape == maps["confidence"].shape == shape
    assert maps["weight_de"].min() >= 0 and maps["weight_de"].max() <= 1 and np.ptp(maps["weight_de"]) > 0
    assert not np.allclose(maps["de"], maps["ce"], atol=1e-3)
    result = Predictor(folder, (0,)).predict_case([file])
    np.testing.assert_allclose(maps["fused"], result["probabilities"], atol=1e-5)
    assert np.array_equal(maps["segmentation"], result["segmentation"])


def test_other_models_have_no_experts(stock: Path, images: Path) -> None:
    with pytest.raises(ValueError, match="holds a nnUNetTrainer"):
        expert_maps(stock, [str(images / "case_000_0000.nii.gz")])
