"""Fitting the temperature of a model on the validation cases of its folds, predicted as ``predict`` would."""

from __future__ import annotations

import functools
import math
import operator
import pickle
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from scipy.ndimage import maximum_filter
from tqdm import tqdm

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.data.dataset import preprocessed_folder
from nnunet_diffext.data.modalities import MODALITIES, modalities_of
from nnunet_diffext.data.splits import load_split
from nnunet_diffext.evaluation.calibration import Calibration, calibration
from nnunet_diffext.evaluation.cases import as_background
from nnunet_diffext.evaluation.provenance import provenance
from nnunet_diffext.inference.grid import ModelPlans, inside_crop, probabilities_to_original, with_previous_stage
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.stored import StoredCase, bytes_per_voxel, no_space, require_space
from nnunet_diffext.inference.temperature import (
    VoxelSample,
    apply_temperature,
    at_the_limit,
    fit_temperature,
    sample_voxels,
)
from nnunet_diffext.settings import PLANS_KEY

VOXELS_PER_CASE = 200_000
BAND_VOXELS = 3
CROSS_VALIDATED_FROM = 4
FIGURES = ("nll", "ece", "brier")

Figures = dict[str, float]


@dataclass(frozen=True)
class CasePrediction:
    """What is kept of a validation case: its probabilities, their calibration, and the voxels to fit on."""

    stored: StoredCase
    before: Calibration
    voxels: VoxelSample

    @property
    def hidden(self) -> tuple[int, ...]:
        """Classes that nobody looked for in the case."""
        return self.voxels.hidden


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
        ValueError: fold ``all``; validation cases that were trained on, or none; a case without a modality although
            others have one; the temporary folder is too small.
        FileNotFoundError: the preprocessed data, a reference or the split is missing.
    """
    if "all" in folds:
        raise ValueError(
            "Fold 'all' was trained on every case: none is left on which its probabilities could be checked, and on "
            "training cases it looks better than it is. Calibrate the folds of a cross-validation: -f 0 1 2 3 4."
        )
    predictor = make_predictor(int(folds[0]))
    cases = _cases_of(predictor.model, folds)
    require_space(sum(_bytes_of(predictor.model, case) for of_fold in cases.values() for case in of_fold))
    with _scratch() as scratch:
        predictions: list[CasePrediction] = []
        for fold, names in cases.items():
            predictor = predictor if fold == folds[0] else make_predictor(int(fold))
            previous = _previous_stage_folder(predictor) if predictor.model.is_cascade else None
            for case in tqdm(names, f"fold {fold}", disable=not show_progress):
                predictions.append(_predict(predictor, case, previous, Path(scratch), seed))
        regions = predictor.model.space.regions
        temperature = fit_temperature([p.voxels for p in predictions], regions)
        content = {
            "temperature": temperature,
            "at_the_limit_of_the_search": at_the_limit(temperature),
            "before": _figures(p.before for p in predictions),
            "after": _measure(predictions, [temperature] * len(predictions), regions),
            "cross_validated": _cross_validate(predictions, regions),
        }
    provenance_ = provenance()
    return {
        **content,
        "cases": [p.stored.name for p in predictions],
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


def _cases_of(model: ModelPlans, folds: Sequence[int | str]) -> dict[int | str, tuple[str, ...]]:
    """Fold -> its validation cases."""
    cases: dict[int | str, tuple[str, ...]] = {}
    for fold in folds:
        cases[fold] = validation_cases(model, int(fold))
        twice = [case for case in cases[fold] for other in cases if other != fold and case in cases[other]]
        if twice:
            raise ValueError(f"{twice[0]} is a validation case of several folds; calibrate one of them.")
    return cases


def _bytes_of(model: ModelPlans, case: str) -> int:
    """What :class:`StoredCase` will take of the temporary folder; 0 for one that cannot be read, as is said later."""
    file = preprocessed_folder(model.plans.dataset_name) / model.configuration.data_identifier / f"{case}.pkl"
    try:
        box = pickle.loads(file.read_bytes())["bbox_used_for_cropping"]
    except (OSError, KeyError, EOFError, pickle.UnpicklingError):
        return 0
    return math.prod(stop - start for start, stop in box) * bytes_per_voxel(model.space.num_heads, model.space.regions)


def _scratch() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="nnunet_diffext_calibrate_", ignore_cleanup_errors=True)
    except OSError as error:
        raise no_space(error.strerror or error) from error


def _predict(predictor: Predictor, case: str, previous: Path | None, scratch: Path, seed: int) -> CasePrediction:
    """Predict a case from its preprocessed data; keep what measuring needs in files."""
    model = predictor.model
    data, properties = _load(model, case, previous)
    ensemble = predictor.predict_preprocessed(data)
    segmentation, probabilities = probabilities_to_original(model, ensemble.probabilities, properties)
    truth = inside_crop(model, _reference(model, case), properties)
    segmentation = inside_crop(model, segmentation, properties)
    probabilities = np.ascontiguousarray(inside_crop(model, probabilities, properties))
    annotated = _annotated(model, case)
    regions, hidden = model.space.regions, ()
    if not regions and not annotated.all():  # where nobody looked for a label, background means "none of the others"
        hidden = tuple(np.flatnonzero(~annotated).tolist())
        truth, segmentation = (np.where(np.isin(part, hidden), 0, part) for part in (truth, segmentation))
    ignore = model.labels.ignore_label
    mask = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    foreground = (segmentation > 0) | ((truth > 0) & mask)
    band = maximum_filter(foreground.astype(np.uint8), size=2 * BAND_VOXELS + 1) > 0
    generator = np.random.default_rng([seed, zlib.crc32(case.encode())])
    index, weight = sample_voxels(band, mask, VOXELS_PER_CASE, generator)
    if regions:
        probabilities = probabilities[annotated]
        values = [v for (v, _), known in zip(model.foreground().values(), annotated, strict=True) if known]
        reference = np.stack([np.isin(truth, v) for v in values])
    else:
        reference = truth.astype(np.int64)
    p, y = (array.reshape(-1, mask.size)[:, index] for array in (probabilities, reference))
    stored = StoredCase(scratch, case, probabilities, reference, mask)
    before = calibration(as_background(probabilities, hidden), reference, regions=regions, mask=mask)
    return CasePrediction(stored, before, VoxelSample(p, y, weight, hidden))


def _annotated(model: ModelPlans, case: str) -> np.ndarray:
    """Heads that somebody looked for in the case, bool ``(K,)``."""
    if MODALITIES not in model.dataset_json.get(PLANS_KEY, {}):
        return np.ones(model.space.num_heads, bool)
    return np.array(modalities_of(model.dataset_json).annotated(case))


def _load(model: ModelPlans, case: str, previous: Path | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Preprocessed image ``(C, *)`` and properties, as the final validation of a training reads them."""
    folder = preprocessed_folder(model.plans.dataset_name) / model.configuration.data_identifier
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
    model, folder = predictor.model, predictor.model_folder.resolve()
    stage = model.configuration.previous_stage_name
    # the folder may have been renamed since
    checkpoint = read_safely(folder / f"fold_{predictor.folds[0]}" / predictor.checkpoint)
    configuration = checkpoint["init_args"]["configuration"]
    sibling = folder.parent / f"{predictor.nnunet.trainer_name}__{model.plans.plans_name}__{stage}"
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
    """Figures of every case at its temperature."""

    def parts() -> Iterator[Calibration]:
        for prediction, temperature in zip(predictions, temperatures, strict=True):
            probabilities, reference, mask = prediction.stored.load()
            p = as_background(apply_temperature(probabilities, temperature, regions), prediction.hidden)
            yield calibration(p, reference, regions=regions, mask=mask)

    return _figures(parts())


def _figures(parts: Iterable[Calibration]) -> Figures:
    """Calibration of all annotated voxels of all cases together."""
    total = functools.reduce(operator.add, parts)
    return {name: getattr(total, name) for name in FIGURES}
