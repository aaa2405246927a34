"""The demo's own steps, and once everything through the real commands."""

import json

import matplotlib.image
import numpy as np
import pytest

from nnunet_diffext.cli.main import main
from nnunet_diffext.demo.pictures import draw_case
from nnunet_diffext.demo.runner import MARKER, markdown, prepare_folder
from nnunet_diffext.demo.synthetic import LABELS, write_dataset


def test_folder_with_other_content_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not made by the demo"):
            prepare_folder(tmp_path, overwrite)
    assert (tmp_path / "thesis.txt").is_file()


def test_earlier_demo_is_overwritten_only_on_request(tmp_path):
    out = tmp_path / "demo"
    prepare_folder(out, overwrite=False)
    (out / "old").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        prepare_folder(out, overwrite=False)
    assert (out / "old").is_file()
    prepare_folder(out, overwrite=True)
    assert [p.name for p in out.iterdir()] == [MARKER]


def test_markdown_states_means_commands_and_machine():
    def result(*dice):
        return {"training_s": 61.4, "mean": {n: {"dice": d} for n, d in zip(list(LABELS)[1:], dice, strict=True)}}

    text = markdown(
        {
            "options": {"test": 4, "labeled": 6, "unlabeled": 16, "epochs": 8, "iterations": 50, "seed": 0},
            "results": {"nnU-Net": result(0.9, 0.5, 0.4, 0.2), "DMED-Seg": result(0.8, float("nan"), 0.4, 0.0)},
            "commands": [{"command": "nnUNetv2_train 990"}],
            "date": "2026-01-01",
            "cpu": "some cpu",
            "cores": 2,
            "versions": {"torch": "2"},
        }
    )
    assert "| nnU-Net | 0.900 | 0.500 | 0.400 | 0.200 | 0.500 | 61 s |" in text
    assert "| DMED-Seg | 0.800 | nan | 0.400 | 0.000 | nan | 61 s |" in text
    assert "    nnUNetv2_train 990\n" in text and "some cpu" in text


def changed_columns(first, second):
    """Range of the columns, as a share of the width, in which two pictures differ."""
    a, b = (matplotlib.image.imread(p)[..., :3] for p in (first, second))
    columns = np.flatnonzero(np.any(a != b, axis=(0, 2))) / a.shape[1]
    return columns.min(), columns.max()


def test_picture_shows_predictions_and_maps_in_their_panels(tmp_path):
    write_dataset(tmp_path, labeled=0, unlabeled=0, test=2)
    image, truth = tmp_path / "imagesTs/test_000_0000.nii.gz", tmp_path / "labelsTs/test_000.nii.gz"
    other = tmp_path / "labelsTs/test_001.nii.gz"

    def draw(name, prediction=truth, weight=0.0, confidence=0.0):
        # The preprocessed grid differs from the image's.
        maps = {"weight_de": np.full((18, 60, 60), weight), "confidence": np.full((18, 60, 60), confidence)}
        draw_case(image, truth, {"nnU-Net": prediction}, maps, LABELS, tmp_path / "out" / name)
        return tmp_path / "out" / name

    plain = draw("plain.png")
    prediction = changed_columns(plain, draw("prediction.png", prediction=other))
    weight = changed_columns(plain, draw("weight.png", weight=1.0))
    confidence = changed_columns(plain, draw("confidence.png", confidence=1.0))
    # Image and truth come before the prediction, the maps after it, and no panel reaches into the next.
    assert 0.3 < prediction[0] < prediction[1] < weight[0] < weight[1] < confidence[0] < confidence[1]


@pytest.mark.slow
def test_quick_demo_runs_every_step(tmp_path):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["results"]) == ["nnU-Net", "DMED-Seg"]
    for result in summary["results"].values():
        assert list(result["cases"]) == ["test_000"]
        assert 0 <= result["mean"]["liver"]["dice"] <= 1
    assert (out / "summary.md").is_file() and (out / "pictures" / "test_000.png").is_file()
