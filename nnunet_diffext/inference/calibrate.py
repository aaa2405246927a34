"""Fitting the temperature of a model on the validation cases of its folds, predicted as ``predict`` would."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from scipy.ndimage import maximum_filter
from tqdm import tqdm

from nnunet_diffext.data.dataset import preprocessed_folder
from nnunet_diffext.data.splits import load_split
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.inference.grid import ModelPlans, inside_crop, probabilities_to_original, with_previous_stage
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.temperature import (
    VoxelSample,
    apply_temperature,
    at_the_limit,
    fit_temperature,
    sample_voxels,
)

VOXELS_PER_CASE = 200_000
BAND_VOXELS = 3
CROSS_VALIDATED_FROM = 4
FIGURES = ("nll", "ece", "brier")

Figures = dict[str, float]


@dataclass(frozen=True)
class CasePrediction:
    """Stored prediction of a validation case: probabilities ``(K, *)`` and reference in ``.npy`` files, and the voxels
    to fit on."""

    name: str
    probabilities: Path
    reference: Path
    mask: Path
    voxels: VoxelSample


def calibrate(
    make_predictor: Callable[[int], Predictor], folds: Sequence[int | str], *, seed: int = 0, show_progress: bool = True
) -> dict[str, Any]:
    """Fit T and measure calibration before and after. The content of ``calibration.json``.

    The after-figures are measured on the cases that T was fitted on. With at least 4 cases, ``cross_validated`` holds
    those where T comes from one half of the cases and is measured on the other.

    Args:
        make_predictor: fold -> predictor of this fold alone, at temperature 1.
        folds: each predicts its own validation cases; all cases are pooled.
        seed: of the voxels that are drawn to fit on.
        show_progress: a progress bar over the cases.

    Raises:
        ValueError: fold ``all``; validation cases that were trained on, or none. FileNotFoundError: the preprocessed
            data, a reference or the split is missing.
    """
    if "all" in folds:
        raise ValueError(
            "Fold 'all' was trained on every case: none is left on which its probabilities could be checked, and on "
            "training cases it looks better than it is. Calibrate the folds of a cross-validation: -f 0 1 2 3 4."
        )
    with tempfile.TemporaryDirectory(prefix="nnunet_diffext_calibrate_", ignore_cleanup_errors=True) as scratch:
        predictions: list[CasePrediction] = []
        for fold in folds:
            predictor = make_predictor(int(fold))
            for case in tqdm(validation_cases(predictor.model, int(fold)), f"fold {fold}", disable=not show_progress):
                if any(case == p.name for p in predictions):
                    raise ValueError(f"{case} is a validation case of several folds; calibrate one of them.")
                predictions.append(_predict(predictor, case, Path(scratch), seed))
        regions = predictor.model.space.regions
        temperature = fit_temperature([p.voxels for p in predictions], regions)
        content = {
            "temperature": temperature,
            "at_the_limit_of_the_search": at_the_limit(temperature),
            "before": _measure(predictions, [1.0] * len(predictions), regions),
            "after": _measure(predictions, [temperature] * len(predictions), regions),
            "cross_validated": _cross_validate(predictions, regions),
        }
    provenance_ = provenance()
    return {
        **content,
        "cases": [p.name for p in predictions],
        "settings": {**predictor.settings.as_dict(), "folds": list(folds)},
        "versions": provenance_["versions"],
        "date": provenance_["date"],
    }


def report_lines(content: dict[str, Any]) -> list[str]:
    """The figures for the user."""
    cases, temperature = len(content["cases"]), content["temperature"]
    folds = " ".join(map(str, content["settings"]["folds"]))
    lines = [f"Temperature {temperature:.4f}, fitted on {cases} case(s) of fold {folds}"]
    lines.append(f"{'':32}" + "".join(f"{name.upper():>10}" for name in FIGURES))
    rows = {"before": "before", "after": "after (on the fitted cases)"}
    if content["cross_validated"] is not None:
        rows["cross_validated"] = "after (on the other half)"
    for key, title in rows.items():
        lines.append(f"{title:32}" + "".join(f"{content[key][name]:10.5f}" for name in FIGURES))
    if content["cross_validated"] is None:
        lines.append(f"Fewer than {CROSS_VALIDATED_FROM} cases: the figures after are those of the fitted cases alone.")
    if content["at_the_limit_of_the_search"]:
        lines.append("WARNING: the search ended at its limit: one temperature cannot calibrate these probabilities.")
    return lines


def validation_cases(model: ModelPlans, fold: int) -> tuple[str, ...]:
    """Validation cases of a fold, from ``splits_final.json``.

    Raises:
        ValueError: no such fold in the file, no case in it, or cases that are trained on as well.
        FileNotFoundError: no such file.
    """
    split = load_split(preprocessed_folder(model.plans.dataset_name), fold)
    seen = sorted(set(split.val) & set(split.train))
    if seen:
        raise ValueError(f"Fold {fold} was trained on its own validation cases ({', '.join(seen[:5])}).")
    if not split.val:
        raise ValueError(f"Fold {fold} has no validation cases in splits_final.json: there is nothing to fit on.")
    return split.val


def _predict(predictor: Predictor, case: str, scratch: Path, seed: int) -> CasePrediction:
    """Predict a case from its preprocessed data; keep what measuring needs in files."""
    model = predictor.model
    data, properties = _load(predictor, case)
    ensemble = predictor.predict_preprocessed(data)
    segmentation, probabilities = probabilities_to_original(model, ensemble.probabilities, properties)
    truth = inside_crop(model, _reference(model, case), properties)
    probabilities = np.ascontiguousarray(inside_crop(model, probabilities, properties))
    ignore = model.labels.ignore_label
    mask = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    foreground = (inside_crop(model, segmentation, properties) > 0) | ((truth > 0) & mask)
    band = maximum_filter(foreground.astype(np.uint8), size=2 * BAND_VOXELS + 1) > 0
    generator = np.random.default_rng([seed, zlib.crc32(case.encode())])
    index, weight = sample_voxels(band, mask, VOXELS_PER_CASE, generator)
    if model.space.regions:
        values = [v for v, _ in model.foreground().values()]
        reference = np.stack([np.isin(truth, v) for v in values])
    else:
        reference = truth.astype(np.int64)
    files = [scratch / f"{len(list(scratch.iterdir()))}_{name}.npy" for name in ("p", "y", "mask")]
    for file, array in zip(files, (probabilities, reference, mask), strict=True):
        np.save(file, array)
    p, y = (array.reshape(-1, mask.size)[:, index] for array in (probabilities, reference))
    return CasePrediction(case, *files, VoxelSample(p, y, weight))


def _load(predictor: Predictor, case: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Preprocessed image ``(C, *)`` and properties, as the final validation of a training reads them."""
    model = predictor.model
    folder = preprocessed_folder(model.plans.dataset_name) / model.configuration.data_identifier
    previous = _previous_stage_folder(predictor) if model.is_cascade else None
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist. Preprocess the configuration: nnUNetv2_preprocess")
    dataset: nnUNetBaseDataset = infer_dataset_class(str(folder))(
        str(folder), [case], folder_with_segs_from_previous_stage=None if previous is None else str(previous)
    )
    try:
        data, _, segmentation, properties = dataset.load_case(case)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The preprocessed data of {case} are incomplete: {error}") from error
    data = np.asarray(data[:], dtype=np.float32)
    if previous is not None:
        segmentation = np.asarray(segmentation[:])
        data = with_previous_stage(model, data, segmentation.reshape(data.shape[1:]))
    return np.ascontiguousarray(data), properties


def _previous_stage_folder(predictor: Predictor) -> Path:
    """Where the previous stage's training left its out-of-fold segmentations for this configuration."""
    trainer, plans, configuration = predictor.model_folder.resolve().name.split("__")
    stage = predictor.model.configuration.previous_stage_name
    sibling = predictor.model_folder.resolve().parent / f"{trainer}__{plans}__{stage}"
    folder = sibling / "predicted_next_stage" / configuration
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist. Run the validation of {stage}: nnUNetv2_train ... --val")
    return folder


def _reference(model: ModelPlans, case: str) -> np.ndarray:
    """Ground truth ``(*)`` as nnU-Net keeps it beside the preprocessed data."""
    file = preprocessed_folder(model.plans.dataset_name) / "gt_segmentations" / f"{case}{model.file_ending}"
    if not file.is_file():
        raise FileNotFoundError(f"The reference {file} does not exist. Run nnUNetv2_preprocess again.")
    return model.plans.image_reader_writer_class().read_seg(str(file))[0][0].astype(np.int64)


def _cross_validate(predictions: Sequence[CasePrediction], regions: bool) -> dict[str, Any] | None:
    """Every case at the temperature that the other half of the cases gives; cases alternate between the halves."""
    if len(predictions) < CROSS_VALIDATED_FROM:
        return None
    halves = [fit_temperature([p.voxels for p in predictions[half::2]], regions) for half in (0, 1)]
    other = [halves[1 - index % 2] for index in range(len(predictions))]
    return {**_measure(predictions, other, regions), "temperatures": halves}


def _measure(predictions: Sequence[CasePrediction], temperatures: Sequence[float], regions: bool) -> Figures:
    """Calibration of all annotated voxels of all cases together."""
    from nnunet_diffext.evaluation.calibration import calibration

    total = None
    for probabilities, reference, mask, temperature in _stored(predictions, temperatures):
        p = apply_temperature(probabilities, temperature, regions)
        part = calibration(p, reference, regions=regions, mask=mask)
        total = part if total is None else total + part
    return {name: getattr(total, name) for name in FIGURES}


def _stored(
    predictions: Sequence[CasePrediction], temperatures: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    for p, temperature in zip(predictions, temperatures, strict=True):
        yield np.load(p.probabilities), np.load(p.reference), np.load(p.mask), temperature
