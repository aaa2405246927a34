"""Were the scored cases trained on? The claim that a model is good on new cases depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_diffext.data.dataset import nnunet_folder
from nnunet_diffext.data.splits import load_split, number_of_folds
from nnunet_diffext.report.model import ReportedModel

HELD_OUT, TRAINED, UNKNOWN = "held out", "trained", "unknown"


@dataclass(frozen=True)
class Exposure:
    """What is known about it.

    Attributes:
        status: `HELD_OUT`, `TRAINED` or `UNKNOWN`.
        why: one sentence.
    """

    status: str
    why: str


def validation_exposure(model: ReportedModel, fold: str, cases: Sequence[str]) -> Exposure:
    """Of the cases in the ``validation`` folder of a fold."""
    if fold == "all":
        return Exposure(TRAINED, "Fold 'all' is trained on every case, its validation cases included.")
    try:
        root = nnunet_folder("nnUNet_preprocessed") / model.dataset
        folds = number_of_folds(root)
        if not folds or int(fold) >= folds:
            return Exposure(HELD_OUT, f"Fold {fold} is one of nnU-Net's own splits, which keep validation cases apart.")
        seen = sorted(set(load_split(root, int(fold)).train) & set(cases))
    except (OSError, ValueError) as error:
        return Exposure(UNKNOWN, f"The split of fold {fold} could not be read ({error}).")
    if seen:
        return Exposure(TRAINED, f"The split trains fold {fold} on {_listed(seen)}.")
    return Exposure(HELD_OUT, f"The split keeps the validation cases of fold {fold} apart from its training cases.")


def prediction_exposure(model: ReportedModel, cases: Sequence[str]) -> Exposure:
    """Of the cases in a folder of predictions, as far as names tell."""
    train: set[str] = set()
    unlabeled: set[str] = set()
    try:
        root = nnunet_folder("nnUNet_preprocessed") / model.dataset
        for fold in model.folds:
            if fold.name == "all":
                raise ValueError("fold 'all' is trained on every case of the dataset")
            split = load_split(root, int(fold.name))
            train, unlabeled = train | set(split.train), unlabeled | set(split.unlabeled)
    except (OSError, ValueError) as error:
        return Exposure(UNKNOWN, f"Whether the model was trained on these cases is not known: {error}.")
    seen, looked_at = sorted(train & set(cases)), sorted(unlabeled & set(cases))
    if seen:
        return Exposure(TRAINED, f"The reported folds were trained on {_listed(seen)}.")
    if looked_at:
        return Exposure(TRAINED, f"The images of {_listed(looked_at)} were used in training, without their labels.")
    return Exposure(HELD_OUT, "By their names, none of the cases is a training case of the reported folds.")


def combine(exposures: Sequence[Exposure]) -> Exposure:
    """The worst of several: one case that was trained on is enough."""
    for status in (TRAINED, UNKNOWN, HELD_OUT):
        reasons = [e.why for e in exposures if e.status == status]
        if reasons:
            return Exposure(status, " ".join(dict.fromkeys(reasons)))
    return Exposure(UNKNOWN, "No case was scored.")


def _listed(cases: Sequence[str]) -> str:
    return f"{len(cases)} of these cases ({', '.join(cases[:5])}{', ...' if len(cases) > 5 else ''})"
