"""What can be asked of a trained model beyond its segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from workspace import predict

from nnunet_diffext.checkpoints import CheckpointError
from nnunet_diffext.inference.experts import expert_maps


def test_maps_agree_with_the_stock_prediction(trained: Path, test_images: Path, tmp_path: Path) -> None:
    import SimpleITK as sitk

    image = sorted(test_images.iterdir())[0]
    maps = expert_maps(trained, [str(image)], fold=0)
    shape = maps["image"].shape[1:]
    for name in ("fused", "de", "ce"):
        assert maps[name].shape == (2, *shape)
        np.testing.assert_allclose(maps[name].sum(0), 1, atol=5e-3)  # averaged over tiles in half precision
    assert maps["weight_de"].shape == maps["confidence"].shape == shape
    # a softmax weight close to 1 is 1 in half precision
    assert maps["weight_de"].min() >= 0 and maps["weight_de"].max() <= 1 and np.ptp(maps["weight_de"]) > 0
    assert maps["confidence"].min() >= -1e-3 and maps["confidence"].max() <= 1
    assert not np.allclose(maps["de"], maps["ce"], atol=1e-3)

    predict(trained, test_images, tmp_path / "out", folds=(0,))
    stock = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / image.name.replace("_0000", ""))))
    assert maps["segmentation"].shape == stock.shape
    # probabilities are averaged here, logits by nnU-Net: they may differ where the tiles disagree
    assert (maps["segmentation"] == stock).mean() > 0.95


def test_missing_checkpoint_is_named(trained: Path, test_images: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint_nowhere.pth"):
        expert_maps(trained, [str(sorted(test_images.iterdir())[0])], checkpoint="checkpoint_nowhere.pth")
