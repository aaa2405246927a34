"""The modality of what is predicted: who may answer, and what is written down for those who evaluate it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nnunet_diffext.data.modalities import modalities_of
from nnunet_diffext.inference.calibration_file import describe_use
from nnunet_diffext.inference.modality import modality_of_image, set_modality
from nnunet_diffext.inference.output_folder import prepare_folder

TWO = {"modalities": {"001_a": "CT", "002_a": "MR"}, "annotated": {"MR": ["b"]}}


def ensemble(*active: tuple[bool, bool]) -> Any:
    """nnU-Net's predictor, as far as ``set_modality`` sees it."""
    network = SimpleNamespace(modalities=("CT", "MR"), modality=None)
    return SimpleNamespace(network=network, list_of_parameters=[{"active": torch.tensor(a)} for a in active])


def test_every_fold_must_know_it() -> None:
    both = ensemble((True, True), (True, True))
    set_modality(both, "MR")
    assert both.network.modality == 1
    partly = ensemble((True, True), (True, False))
    with pytest.raises(ValueError, match="was never trained on it in 1 of 2 folds"):
        set_modality(partly, "MR")
    assert partly.network.modality is None
    set_modality(partly, "CT")
    with pytest.raises(ValueError, match="was never trained on it. If"):
        set_modality(ensemble((True, False)), "MR")


def predictor(diffext: dict[str, Any] | None) -> Any:
    """A model, as far as ``prepare_folder`` sees it."""
    content = {"labels": {"background": 0, "a": 1, "b": 2}, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
    model = SimpleNamespace(
        dataset_json={**content, **({} if diffext is None else {"diffext": diffext})},
        plans=SimpleNamespace(plans={}),
    )
    settings = SimpleNamespace(as_dict=dict)
    return SimpleNamespace(model=model, settings=settings, temperature=1.0, model_folder=Path("model"))


def written(folder: Path, modality: str | None, cases: list[str], diffext: dict[str, Any] | None = TWO) -> Any:
    prepare_folder(predictor(diffext), folder, False, {"modality": modality}, cases)
    return json.loads((folder / "dataset.json").read_text())


def test_modality_is_written_down(tmp_path: Path) -> None:
    """With that of earlier calls into the same folder, whatever the later one was told."""
    assert "diffext" not in written(tmp_path / "plain", None, ["x"], None)
    assert written(tmp_path / "single", "MR", ["x"], None)["diffext"] == {"modalities": {"x": "MR"}}
    out = tmp_path / "out"
    written(out, "MR", ["x", "y"])
    written(out, "CT", ["z"])
    found = modalities_of(written(out, None, ["y"]))
    assert {case: found.of_case.get(case) for case in "xyz"} == {"x": "MR", "y": None, "z": "CT"}
    assert found.annotated("x") == (True, False, True), "as the model was taught"


def test_case_that_is_called_like_a_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The predictions are worth more than the note."""
    content = written(tmp_path, "MR", ["CT"])
    assert content["diffext"] == TWO
    assert "WARNING: the modality of the predicted cases is not in" in capsys.readouterr().out


def test_a_temperature_was_fitted_without_it() -> None:
    settings = {"folds": [0], "checkpoint": "checkpoint_final.pth"}
    content = {"temperature": 1.5, "settings": settings}
    told, untold = (describe_use(content, Path("model"), settings, modality) for modality in ("MR", None))
    assert len(told) == 2 and "for MR, given, another one may be better" in told[1] and untold == told[:1]
    assert describe_use(None, Path("model"), settings, "MR") == []


class Teller(torch.nn.Module):
    """Tells MR where a tile is bright, and hesitates otherwise."""

    modality: int | None = None

    def tell(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[2:] == (4, 4)
        bright = image.mean((1, 2, 3)) > 0.5
        return torch.where(bright[:, None], torch.tensor([-3.0, -0.05]), torch.tensor([-0.6, -0.8]))


def test_all_tiles_of_an_image_have_one_modality() -> None:
    """Two of three tiles say CT, with less conviction; plane by plane; for the time of this image only."""
    network = Teller()
    nnunet = SimpleNamespace(
        network=network,
        device=torch.device("cpu"),
        configuration_manager=SimpleNamespace(patch_size=(4, 4)),
        list_of_parameters=[{}],
    )
    image = torch.zeros(1, 3, 4, 3)
    with modality_of_image(nnunet, image):
        assert network.modality == 0
    image[:, 1] = 1
    with modality_of_image(nnunet, image):
        assert network.modality == 1
    with pytest.raises(RuntimeError, match="in between"), modality_of_image(nnunet, image):
        raise RuntimeError("in between")
    assert network.modality is None
    network.modality = 0
    with modality_of_image(nnunet, image):
        assert network.modality == 0, "given"
    assert network.modality == 0
    for other in (torch.nn.Linear(1, 1), SimpleNamespace(modality=None, tell=lambda _: None, to=lambda _: None)):
        nnunet.network = other
        with modality_of_image(nnunet, image):
            assert getattr(other, "modality", None) is None


def test_folds_that_disagree_have_one_modality() -> None:
    """A fold that was never trained on MR has no veto against those that were."""

    class Folds(Teller):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("said", torch.zeros(1, 2))

        def tell(self, image: torch.Tensor) -> torch.Tensor:
            return self.said

    network, image = Folds(), torch.zeros(1, 4, 4)
    nnunet = SimpleNamespace(
        network=network, device=torch.device("cpu"), configuration_manager=SimpleNamespace(patch_size=(4, 4))
    )
    says_ct, says_mr = ({"said": torch.tensor([row])} for row in ([0.0, -1e9], [-8.0, -0.001]))
    for states, expected in (([says_ct, says_mr, says_mr], 1), ([says_ct, says_ct, says_mr], 0)):
        nnunet.list_of_parameters = states
        with modality_of_image(nnunet, image):
            assert network.modality == expected
