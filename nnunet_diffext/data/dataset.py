"""Where nnU-Net keeps a dataset: name, folders, training cases. Errors say which command makes what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunetv2 import paths
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

UNLABELED_SUFFIX = "_unlabeled"
NORMALIZATIONS = {"nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
"""What nnU-Net allows as channel names although it describes no image."""


def nnunet_folder(variable: str) -> Path:
    """The folder that ``nnUNet_raw`` or ``nnUNet_preprocessed`` names.

    Raises:
        ValueError: the variable is not set.
    """
    path = getattr(paths, variable)
    if not path.is_set():
        raise ValueError(f"The environment variable {variable} is not set. Set it to the folder that nnU-Net uses.")
    return Path(path)


def dataset_name(name_or_id: str | int) -> str:
    """``910``, ``"910"`` or ``"Dataset910_LeftAtrium"`` -> ``"Dataset910_LeftAtrium"``.

    Raises:
        ValueError: no dataset, or more than one, has this ID in nnU-Net's folders.
    """
    try:
        return str(maybe_convert_to_dataset_name(name_or_id))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def dataset_id(name: str) -> str:
    """``"Dataset007_X"`` -> ``"7"``, for the commands that messages print."""
    match = re.match(r"Dataset(\d{3})", name)
    return str(int(match.group(1))) if match else name


def preprocessed_folder(name: str) -> Path:
    """Folder of the dataset in ``nnUNet_preprocessed``.

    Raises:
        FileNotFoundError: it does not exist.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist. Plan and preprocess the dataset first: "
            f"nnUNetv2_plan_and_preprocess -d {dataset_id(name)}"
        )
    return folder


def unlabeled_folder(preprocessed_dataset_dir: str | Path, data_identifier: str) -> Path:
    """Where the preprocessed images without labels of one configuration lie. Never the folder of the labelled cases,
    because nnU-Net takes everything in that one for training data."""
    return Path(preprocessed_dataset_dir) / (data_identifier + UNLABELED_SUFFIX)


def load_json(file: Path, missing: str) -> Any:
    """Content of a JSON file.

    Args:
        file: what to read.
        missing: what to do if there is no such file; ends the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. {missing}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def training_ids(name: str, plans_name: str | None = None) -> list[str]:
    """Sorted ids of the labelled cases: what nnU-Net itself would make its five folds from.

    Those of the preprocessed folders, as in ``nnUNetTrainer.do_split``; before preprocessing, those of ``imagesTr``.

    Args:
        name: dataset name.
        plans_name: look at the folders of these plans only; default: of all plans.

    Raises:
        FileNotFoundError: the dataset is neither preprocessed nor in ``nnUNet_raw``.
        ValueError: the preprocessed folders hold different cases.
    """
    found = {
        folder: set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
        for folder in _labeled_folders(name, plans_name)
    }
    if found:
        folder, ids = next(iter(found.items()))
        for other, other_ids in found.items():
            if other_ids != ids:
                raise ValueError(
                    f"{folder} and {other} hold different cases (only in one of them: {sorted(ids ^ other_ids)}). Run "
                    f"nnUNetv2_preprocess -d {dataset_id(name)} again, or name the plans with -plans_name."
                )
        return sorted(ids)
    return _raw_training_ids(name)


def _labeled_folders(name: str, plans_name: str | None) -> list[Path]:
    """Existing, non-empty folders of preprocessed labelled cases."""
    root = nnunet_folder("nnUNet_preprocessed") / name
    identifiers: dict[str, None] = {}
    for file in sorted(root.glob(f"{plans_name or '*'}.json")):
        plans = load_json(file, "")
        configurations = plans.get("configurations", {}) if isinstance(plans, dict) else {}
        # Configurations that inherit (the cascade) have no data_identifier of their own: the base's folder is listed.
        identifiers.update((c["data_identifier"], None) for c in configurations.values() if "data_identifier" in c)
    folders = [root / i for i in identifiers]
    return [f for f in folders if f.is_dir() and any(f.iterdir())]


def _raw_training_ids(name: str) -> list[str]:
    missing = (
        f"Preprocess the dataset (nnUNetv2_plan_and_preprocess -d {dataset_id(name)}), or put its raw data there: the "
        "training cases are read from either."
    )
    if not paths.nnUNet_raw.is_set():
        raise FileNotFoundError(f"No preprocessed cases of {name}, and nnUNet_raw is not set. {missing}")
    raw = Path(paths.nnUNet_raw) / name
    dataset_json = load_json(raw / "dataset.json", missing)
    if "dataset" in dataset_json:
        return sorted(dataset_json["dataset"])
    images = raw / "imagesTr"
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist. {missing}")
    ids = get_identifiers_from_splitted_dataset_folder(str(images), dataset_json["file_ending"])
    return sorted(str(i) for i in ids)


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the channels in their order; none if the file names none."""
    return list(map(str, (dataset_json.get("channel_names", dataset_json.get("modality")) or {}).values()))


def diffext_block(
    dataset_json: Mapping[str, Any], key: str, example: Callable[[], Any], error: type[ValueError] = ValueError
) -> dict[str, Any] | None:
    """``dataset.json["diffext"][key]`` as it stands there, or None.

    Args:
        dataset_json: content of the file.
        key: of the block.
        example: makes what the block may look like, for the message.
        error: to raise.

    Raises:
        ValueError: one of the two is no dictionary.
    """
    block, where = dict(dataset_json), "dataset.json"
    for name in ("diffext", key):
        if name not in block:
            return None
        block, where = block[name], f'{where}["{name}"]'
        if not isinstance(block, dict):
            shown = json.dumps({key: example()}, ensure_ascii=False)
            raise error(f"{where} must be a dictionary, such as {shown}, but is {block!r}.")
    return block


def foreground(dataset_json: Mapping[str, Any], *, unique: bool = True) -> dict[str, tuple[int, ...]]:
    """Name -> label values of the segmentation heads without background: labels by value, regions as they stand.

    Args:
        dataset_json: content of the file.
        unique: refuse two names for one value. nnU-Net makes one label of them, which otherwise has the last of the
            names: what only reads a trained model must not be stricter than the training was.
    Raises:
        ValueError: no such labels, or two names for one.
    """
    labels = {
        name: tuple(map(int, value)) if isinstance(value, list | tuple) else (int(value),)
        for name, value in dataset_json.get("labels", {}).items()
        if name != "ignore"
    }
    regions = any(len(values) > 1 for values in labels.values())
    labels = {name: values for name, values in labels.items() if set(values) != {0}}
    if not labels:
        raise ValueError('dataset.json["labels"] has no label but background.')
    if regions:
        return labels
    names = {values: name for name, values in sorted(labels.items(), key=lambda item: item[1])}
    if unique and len(names) < len(labels):
        raise ValueError('dataset.json["labels"] has two names for one value; nnU-Net makes one label of them.')
    return {name: values for values, name in names.items()}
