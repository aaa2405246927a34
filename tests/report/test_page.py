"""The whole page, from model folders that are like nnU-Net's."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from reported import CASES, LABELS, Page, Studio, plans

from nnunet_diffext.cli.main import main
from nnunet_diffext.evaluation.folder import evaluate_predictions
from nnunet_diffext.report.page import write_report

SECTIONS = {"plain", "results", "cases", "confidence", "training", "run"}


def written(out: Path, *models: Path, cases: int = 0, **options: object) -> Page:
    """The page about these models; it must be well-formed and complete."""
    write_report(models, out, num_processes=1, cases=cases, **options)  # type: ignore[arg-type]
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert {a["id"] for a in page.all("section")} == SECTIONS
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {a["href"] for a in page.all("a")} == {f"#{name}" for name in SECTIONS}
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["src"].startswith("data:image/") for a in page.all("img"))
    # Nothing is fetched: no attribute that names another place, nothing in style and script; text may name one.
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form"} == set()
    attributes = [v or "" for _, a in page.tags for k, v in a.items() if k not in ("alt", "aria-label")]
    assert [v for v in attributes if "//" in v and not v.startswith("data:image/")] == []
    assert not re.search(r"//|url\(|@import|fetch|import\(", "".join(page.code))
    return page


def test_one_model_with_two_folds(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(npz=True, curves=True)
    before = {f: f.stat().st_mtime_ns for f in model.rglob("*")}
    page = written(tmp_path / "new" / "page.html", model, cases=3)
    assert {f: f.stat().st_mtime_ns for f in model.rglob("*")} == before, "a model folder is only read"
    assert "Measured on 4 validation cases the model was not trained on." in page.text
    assert "fold 0: 2 training, 2 validation" in page.text and "2026-01-02 03:04 to 2026-01-02 04:00" in page.text
    assert "8 x 16 x 16" in page.text and "1.5 x 1.5 x 1.5 mm" in page.text and "9.8.7" in page.text
    assert "Zero throughout, and not drawn: silent." in page.text
    assert "Part of the training loss: cac" in page.text and "Pseudo Dice: core" in page.text
    assert "Isensee" in page.text
    kinds = [a["class"] for a in page.all("img")]
    assert kinds.count("photo") == 4, "of four cases the three worst and the remaining one are drawn"
    assert kinds.count("chart") == 4 + 7, "reliability and risk per fold; loss, part, 3 pseudo Dice, rate, time"


def test_numbers_are_those_of_evaluate(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(folds=1)
    report = evaluate_predictions(
        model / "fold_0" / "validation", studio.gt, dataset_json=model / "dataset.json", out=tmp_path, num_processes=1
    ).report
    page = written(tmp_path / "page.html", model)
    for key in report["mean"]:
        values = [row["metrics"][key]["Dice"] for row in report["metric_per_case"]]
        shown = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}{min(values):.3f} to {max(values):.3f}"
        assert shown in page.text
    overall = 100 * np.mean([report["mean"][key]["Dice"] for key in report["mean"]])
    assert f"{overall:.0f}of 100: average overlap" in page.text


def test_two_models_are_compared(studio: Studio, tmp_path: Path) -> None:
    good, bad = studio.model(shift=0), studio.model("nnUNetTrainer_30epochs", folds=1, shift=2, curves=True)
    page = written(tmp_path / "page.html", good, bad)
    assert "B minus A" in page.text
    assert "too few to tell A and B apart" in page.text, "four pairs are no basis for a test"
    assert "Left out, as not every model has them: 2 cases of A." in page.text
    assert page.text.count("100of 100: average overlap") == 1
    assert len(page.all("img")) == 7, "charts of the one model that has curves"
    assert "drawn the right size on average" in page.text


def test_predictions_with_uncertainty_and_quality(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(folds=1)
    pred = studio.predict(tmp_path / "pred", CASES[:2], npz=True)
    (pred / "uncertainty").mkdir()
    np.save(pred / "uncertainty" / f"{CASES[0]}_entropy.npy", np.full((10, 16, 20), 0.5, np.float32))
    (pred / "uncertainty" / f"{CASES[1]}_entropy.nii.gz").write_text("damaged")
    (pred / "quality.csv").write_text(f"case,quality\n{CASES[0]},0.625\n{CASES[1]},nan\n")
    page = written(tmp_path / "page.html", model, pred=[pred], gt=studio.gt, cases=2)
    assert "Expected by the model 0.625, achieved" in page.text
    assert "expected an overlap of 62" in page.text and "over 1 case" in page.text
    assert "The uncertainty map cannot be used" in page.text
    assert sum("uncertainty" in a["alt"] for a in page.all("img")) == 1
    assert "In and around the structures it was 80 % sure" in page.text
    assert "Measured on 2 validation cases the model was not trained on." in page.text


def test_cases_of_the_training_are_not_called_new(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(folds=1)
    pred = studio.predict(tmp_path / "pred", CASES[1:3])
    page = written(tmp_path / "page.html", model, pred=[pred])
    assert "not trained on" not in page.text
    assert "trained on some or all of them" in page.text and f"1 of these cases ({CASES[2]})" in page.text
    (model / "fold_0").rename(model / "fold_all")
    page = written(tmp_path / "page.html", model)
    assert "not trained on" not in page.text and "Fold 'all' is trained on every case" in page.text


def test_summary_of_evaluate_is_used_while_it_is_newer(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(folds=1)
    folder = model / "fold_0" / "validation"
    evaluate_predictions(folder, studio.gt, dataset_json=model / "dataset.json", num_processes=1)
    file = folder / "summary_diffext.json"
    summary = json.loads(file.read_text())
    for row in summary["metric_per_case"]:
        row["metrics"]["1"]["Dice"] = 0.1234
    file.write_text(json.dumps(summary))
    assert "0.123" in written(tmp_path / "page.html", model).text
    old = file.stat().st_mtime - 1000
    os.utime(file, (old, old))
    assert "0.123" not in written(tmp_path / "page.html", model).text
    file.write_text('{"metric_per_case": 3}')
    assert "0.123" not in written(tmp_path / "page.html", model).text


def test_what_is_missing_is_said_in_its_place(studio: Studio, tmp_path: Path) -> None:
    model = studio.model()
    shutil.rmtree(model / "fold_1" / "validation")
    (model / "fold_1" / "debug.json").write_text("{")
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"damaged")
    (model / "fold_1" / "checkpoint_final.pth").rename(model / "fold_1" / "checkpoint_best.pth")
    (model / "calibration.json").write_text('{"temperature": "warm"}')
    (model / "fold_0" / "validation" / f"{CASES[0]}.nii.gz").write_text("damaged")
    shutil.rmtree(studio.dataset / "imagesTr")
    page = written(tmp_path / "page.html", model, cases=1)
    for line in (
        "No predictions of fold 1",
        "debug.json is not valid JSON",
        "checkpoint_final.pth is damaged",
        "Fold 1 has not finished its training",
        "calibration.json cannot be used",
        f"fold 0, {CASES[0]}: ",
        "No picture: its image case_001_0000.nii.gz is not in",
        "there are no probabilities",
        "validation has no quality.csv",
        "No settings of this package are recorded",
    ):
        assert line in page.text, line
    assert "Measured on 1 validation case the model was not trained on." in page.text


def test_model_without_any_prediction(studio: Studio, tmp_path: Path) -> None:
    model = studio.model(folds=1)
    shutil.rmtree(model / "fold_0" / "validation")
    (model / "fold_0" / "checkpoint_final.pth").unlink()
    page = written(tmp_path / "page.html", model)
    assert "nothing can be said about this model" in page.text and "No training curves" in page.text
    assert page.all("img") == []


def test_settings_beside_their_defaults(studio: Studio, tmp_path: Path) -> None:
    model = studio.model("DMEDSegTrainer_noCACL", folds=1)
    content = json.loads((model / "plans.json").read_text())
    content["diffext"] = {"DMEDSegTrainer": {"epochs": 7, "momentum": 0.99, "gone": "<i>old</i>"}}
    (model / "plans.json").write_text(json.dumps(content))
    figures = {"nll": 0.5, "ece": 0.25, "brier": 0.125}
    calibration = {"temperature": 1.5, "before": figures, "after": figures, "cross_validated": None, "cases": CASES[:2]}
    calibration |= {"settings": {"folds": [0]}, "date": "2026-02-03"}
    (model / "calibration.json").write_text(json.dumps(calibration))
    page = written(tmp_path / "page.html", model)
    assert "epochs71000number of epochs" in page.text
    assert "momentum0.990.99" in page.text and "gone'<i>old</i>'not known" in page.text
    assert "Temperature 1.500, fitted on 2 cases of fold 0, 2026-02-03" in page.text
    assert "Xun" in page.text, "the method is to be cited"


def test_hostile_names_stay_text(studio: Studio, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&amp;$\\frac"
    model = studio.model(folds=1)
    dataset_json = json.loads((model / "dataset.json").read_text())
    dataset_json["labels"] = {"background": 0, hostile: 1, "core": 2}
    (model / "dataset.json").write_text(json.dumps(dataset_json))
    (model / "fold_0" / "debug.json").write_text(json.dumps({"reference": hostile, "device": [hostile]}))
    odd = "a<b>&[x]"
    predictions = model / "fold_0" / "validation"
    for folder, ending in ((predictions, ""), (studio.gt, ""), (studio.dataset / "imagesTr", "_0000")):
        shutil.copy(folder / f"{CASES[0]}{ending}.nii.gz", folder / f"{odd}{ending}.nii.gz")
    page = written(tmp_path / "page.html", model, cases=3)
    assert len(page.all("script")) == 1 and hostile in page.text and odd in page.text
    assert page.all("b") == []


def test_2d_png_images(studio: Studio, tmp_path: Path) -> None:
    from PIL import Image

    model = studio.model(folds=1)
    (model / "plans.json").write_text(json.dumps(plans(studio.dataset.name, "NaturalImage2DIO", [16, 16])))
    model = model.rename(model.with_name("nnUNetTrainer__nnUNetPlans__2d"))
    dataset_json = json.loads((model / "dataset.json").read_text()) | {"file_ending": ".png", "labels": LABELS}
    (model / "dataset.json").write_text(json.dumps(dataset_json))
    truth = np.zeros((24, 40), np.uint8)
    truth[6:16, 10:30], truth[8:12, 12:20] = 1, 2
    for folder, array in ((studio.gt, truth), (model / "fold_0" / "validation", np.roll(truth, 2, 1))):
        Image.fromarray(array).save(folder / "photo.png")
    Image.fromarray(np.stack([truth * 100] * 3, -1)).save(studio.dataset / "imagesTr" / "photo_0000.png")
    page = written(tmp_path / "page.html", model, cases=1)
    assert [a["class"] for a in page.all("img")].count("photo") == 1
    assert "Shown: the image, " in page.text and "too large" not in page.text, "a 2D image has no volume"


def test_broken_model_folders_are_refused(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = studio.model(folds=1)
    out = tmp_path / "page.html"

    def refused(*arguments: str | Path) -> str:
        assert main(["report", "-o", str(out), *map(str, arguments)]) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "is no folder" in refused("-m", tmp_path / "nowhere")
    assert "twice" in refused("-m", model, model)
    assert "there are: 0 (-f)" in refused("-m", model, "-f", "3")
    assert "one folder per model" in refused("-m", model, "-pred", tmp_path, tmp_path)
    assert "(-gt)" in refused("-m", model, "-gt", tmp_path / "nowhere")
    assert "--cases" in refused("-m", model, "--cases", "-1")
    other = shutil.copytree(model, model.with_name("nnUNetTrainer__nnUNetPlans__3d_lowres"))
    assert "3d_lowres" in refused("-m", model, other)
    (other / "plans.json").write_text("[]")
    assert "nnU-Net cannot use" in refused("-m", other)
    (other / "plans.json").unlink()
    assert "no complete model folder" in refused("-m", other)
    shutil.rmtree(model / "fold_0")
    assert "nothing was trained there" in refused("-m", model)


def test_command_line(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = studio.model()
    shutil.rmtree(model / "fold_1" / "validation")
    renamed = model.rename(tmp_path / "my_model")
    out = tmp_path / "page.html"
    assert main(["report", "-m", str(renamed), "-o", str(out), "-f", "1", "-np", "1"]) == 0
    printed = capsys.readouterr()
    assert f"Wrote {out}" in printed.out and "note: A: No predictions of fold 1" in printed.err
    assert "fold 0" not in Page(out.read_text()).text, "the configuration comes from the checkpoint of the one fold"
