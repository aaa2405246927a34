"""What to evaluate and how: labels and reader of a dataset, options of the metrics, files of the cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_diffext.data.dataset import load_json
from nnunet_diffext.data.modalities import MODALITIES, modalities_of
from nnunet_diffext.evaluation.calibration import BINS
from nnunet_diffext.evaluation.surface import NSD_TOLERANCE_MM
from nnunet_diffext.settings import PLANS_KEY

BAND_MM = 10.0
OUTPUTS = ("summary_diffext.json", "metrics_diffext.csv", "reliability.png", "risk_coverage.png")


@dataclass(frozen=True)
class Options:
    """Options that change numbers.

    Attributes:
        nsd_tolerance: mm, see `nnunet_diffext.evaluation.surface`.
        band_mm: the band of ``ece_band`` and its like: voxels at most so far from reference or predicted foreground.
        bins: of ECE, MCE and ACE.

    Raises:
        ValueError: a value is out of range.
    """

    nsd_tolerance: float = NSD_TOLERANCE_MM
    band_mm: float = BAND_MM
    bins: int = BINS

    def __post_init__(self) -> None:
        for name in ("nsd_tolerance", "band_mm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a distance in mm, not negative; got {getattr(self, name)}")
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1; got {self.bins}")

    def as_dict(self) -> dict[str, float]:
        """For a result file."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """Labels and files of a dataset.

    Attributes:
        labels: key as in nnU-Net's summary.json, ``"1"`` or ``"(1, 2)"`` -> the label values it consists of, in the
            order of the foreground probabilities.
        names: key -> name in dataset.json.
        regions: probabilities are sigmoids per region instead of a softmax over background and labels.
        ignore_label: value in the reference that means "not annotated".
        file_ending: of segmentations, with the dot.
        reader: nnU-Net's reader class; probabilities are stored in the order of its arrays.
        unannotated: case -> keys that nobody looked for in it, by ``dataset.json["diffext"]``.
    """

    labels: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str]
    regions: bool
    ignore_label: int | None
    file_ending: str
    reader: type
    unannotated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def channels(self) -> dict[str, int]:
        """Key -> index of its probability."""
        return {key: index + (not self.regions) for index, key in enumerate(self.labels)}


@dataclass(frozen=True)
class Case:
    """Files of one case; ``probabilities`` is None if there are none. ``unannotated``: keys that are not scored."""

    name: str
    prediction: Path
    reference: Path
    probabilities: Path | None = None
    unannotated: tuple[str, ...] = ()


def find_dataset_json(pred_dir: Path) -> Path:
    """``dataset.json`` as nnU-Net leaves it: in a folder of predictions, or two above a fold's ``validation`` folder.

    Raises:
        FileNotFoundError: in neither place.
    """
    places = [pred_dir / "dataset.json"]
    if pred_dir.resolve().name == "validation":
        places.append(pred_dir.resolve().parents[1] / "dataset.json")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"no dataset.json at {' or '.join(map(str, places))}; nnUNetv2_predict puts it beside its predictions. "
        "Name the file with -djfile."
    )


def load_task(dataset_json: Path, plans: Path | None = None) -> Task:
    """Labels, regions, ignore label and reader as nnU-Net understands them.

    Args:
        dataset_json: file.
        plans: file; names nnU-Net's reader and label manager where they are not the standard ones.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: nnU-Net cannot use what it says.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.label_handling.label_handling import LabelManager
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    content = load_json(dataset_json, "Name the dataset.json of the predictions.")
    try:
        if plans is None:
            manager = LabelManager(content["labels"], content.get("regions_class_order"))
            reader = determine_reader_writer_from_dataset_json(content, verbose=False)
        else:
            plans_manager = PlansManager(load_json(plans, "Name the plans.json of the predictions."))
            manager = plans_manager.get_label_manager(content)
            reader = plans_manager.image_reader_writer_class
        labels, names = _labels(content["labels"], manager)
        parts = manager.has_regions, manager.ignore_label, content["file_ending"], reader
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        files = dataset_json if plans is None else f"{dataset_json} and {plans}"
        raise ValueError(f"nnU-Net cannot use {files}: {type(error).__name__}: {error}") from error
    return Task(labels, names, *parts, _unannotated(content, labels))


def _unannotated(content: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Case -> keys that nobody looked for in it."""
    if MODALITIES not in content.get(PLANS_KEY, {}):
        return {}
    cases = modalities_of(content)
    result = {}
    for case in cases.of_case:
        known = cases.annotated(case)[-len(labels) :]  # without the background
        result[case] = tuple(key for key, annotated in zip(labels, known, strict=True) if not annotated)
    return result


def _labels(declared: Mapping[str, Any], manager: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    keys = [tuple(map(int, f)) if isinstance(f, (tuple, list)) else int(f) for f in foreground]
    values = {str(key): key if isinstance(key, tuple) else (key,) for key in keys}
    by_values = {tuple(v) if isinstance(v, (tuple, list)) else (v,): name for name, v in declared.items()}
    return values, {key: by_values.get(value, key) for key, value in values.items()}


def find_cases(pred_dir: Path, gt_dir: Path, task: Task) -> tuple[list[Case], list[str]]:
    """Predicted cases, and the names of those that have a reference but no prediction.

    Raises:
        FileNotFoundError: a folder is missing, or there is not one prediction.
    """
    for folder, role in ((pred_dir, "predictions"), (gt_dir, "references")):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; it should hold the {role}")

    def names(folder: Path) -> set[str]:
        files = (f.name for f in folder.glob("*" + task.file_ending) if f.name not in OUTPUTS)
        return {name.removesuffix(task.file_ending) for name in files}

    predicted = sorted(names(pred_dir))
    if not predicted:
        raise FileNotFoundError(f"no file *{task.file_ending} in {pred_dir}: nothing to evaluate")
    cases = []
    for name in predicted:
        npz = pred_dir / f"{name}.npz"
        files = pred_dir / (name + task.file_ending), gt_dir / (name + task.file_ending)
        cases.append(Case(name, *files, npz if npz.is_file() else None, task.unannotated.get(name, ())))
    return cases, sorted(names(gt_dir) - set(predicted))
