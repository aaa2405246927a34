"""Preprocesses images without labels with nnU-Net's own preprocessor, as it does at inference: no fake masks.

``<nnUNet_preprocessed>/<dataset>/<data_identifier>_unlabeled/`` gets ``<case>.b2nd`` and ``<case>.pkl``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffext.data.dataset import (
    channel_names,
    dataset_id,
    dataset_name,
    load_json,
    nnunet_folder,
    preprocessed_folder,
    training_ids,
    unlabeled_folder,
)
from nnunet_diffext.data.image_checks import BadImagesError, Case, check_case, collect_cases
from nnunet_diffext.data.parallel import Failure, PreprocessingError, run_all

DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
SOURCE_KEY = "diffext_source"
"""Properties of a case: fingerprint of its image files and of the plans' entries that preprocessing depends on."""
PLANS_MARK = "diffext_plans"
"""Properties of a case: :func:`plans_fingerprint` of the plans that it was preprocessed with."""


@dataclass(frozen=True)
class PreprocessReport:
    """What :func:`preprocess_unlabeled` did, by configuration.

    Attributes:
        dataset: its name.
        source: where the images are.
        folders: where the preprocessed cases are.
        written: ids that were preprocessed now.
        unchanged: ids that were there already, made from the same files with the same plans.
    """

    dataset: str
    source: Path
    folders: dict[str, Path]
    written: dict[str, tuple[str, ...]]
    unchanged: dict[str, tuple[str, ...]]


def preprocess_unlabeled(
    name_or_id: str | int,
    plans_name: str = "nnUNetPlans",
    configurations: Sequence[str] | None = None,
    source_folder: str | Path | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PreprocessReport:
    """Preprocess images without labels for every configuration.

    All images are read and checked before the first is preprocessed. A case appears in its folder complete or not at
    all; a second call does what is missing or outdated (other plans, changed images).

    Args:
        name_or_id: dataset; must be planned.
        plans_name: name of the plans.
        configurations: default: those of 2d, 3d_fullres and 3d_lowres that the plans have.
        source_folder: default: ``<nnUNet_raw>/<dataset>/imagesTu``. Files are called ``{CASE}_{XXXX}{file_ending}``.
        num_processes: default: nnU-Net's, which is ``nnUNet_def_n_proc`` or 8. One works in this process.
        overwrite: preprocess cases again that are there already.
        show_progress: progress bars.

    Raises:
        BadImagesError: listing everything that is wrong with the images (a ValueError).
        PreprocessingError: cases failed although their images passed the checks (a ValueError).
        FileNotFoundError: no plans, no source folder, no images.
        ValueError: unknown dataset or configuration.
    """
    num_processes = default_num_processes if num_processes is None else num_processes
    if num_processes < 1:
        raise ValueError(f"The number of processes must be at least 1, not {num_processes}.")
    name = dataset_name(name_or_id)
    plans, dataset_json = _load_plans(name, plans_name)
    manager = PlansManager(plans)
    managers = _configurations(manager, configurations, name, plans_name)
    source = Path(source_folder) if source_folder is not None else nnunet_folder("nnUNet_raw") / name / "imagesTu"
    cases = _checked_cases(name, source, manager, plans_name, dataset_json, num_processes, show_progress)
    folders, written, unchanged = {}, {}, {}
    for configuration, configuration_manager in managers.items():
        folder = unlabeled_folder(preprocessed_folder(name), configuration_manager.data_identifier)
        made_with = plans_fingerprint(manager, configuration_manager)
        marks = {c.identifier: _fingerprint(c, made_with) for c in cases}
        todo = [c for c in cases if overwrite or not _is_done(folder, c.identifier, marks[c.identifier])]
        if todo:
            marks = {c.identifier: marks[c.identifier] for c in todo}
            _preprocess(todo, marks, plans, configuration, dataset_json, folder, num_processes, show_progress)
        folders[configuration] = folder
        written[configuration] = tuple(c.identifier for c in todo)
        unchanged[configuration] = tuple(c.identifier for c in cases if c not in todo)
    return PreprocessReport(name, source, folders, written, unchanged)


def _load_plans(name: str, plans_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = preprocessed_folder(name)
    plan = f"nnUNetv2_plan_and_preprocess -d {dataset_id(name)}"
    others = sorted(f.stem for f in folder.glob("*Plans*.json"))
    known = f" Plans of this dataset: {', '.join(others)} (choose with -plans_name)." if others else ""
    plans = load_json(folder / f"{plans_name}.json", f"Make the plans first: {plan}.{known}")
    return plans, load_json(folder / "dataset.json", f"Plan the dataset again: {plan}")


def _configurations(
    manager: PlansManager, wanted: Sequence[str] | None, name: str, plans_name: str
) -> dict[str, ConfigurationManager]:
    """The wanted configurations, one per ``data_identifier``: the cascade uses the data of 3d_fullres."""
    available = manager.available_configurations
    chosen = [c for c in DEFAULT_CONFIGURATIONS if c in available] if wanted is None else list(wanted)
    unknown = [c for c in chosen if c not in available]
    if unknown or not chosen:
        raise ValueError(
            f"The plans {plans_name} of {name} have no configuration {', '.join(unknown or DEFAULT_CONFIGURATIONS)}; "
            f"they have {', '.join(available)}. Choose with -c, or plan again: "
            f"nnUNetv2_plan_experiment -d {dataset_id(name)}"
        )
    managers: dict[str, ConfigurationManager] = {}
    for configuration in chosen:
        candidate = manager.get_configuration(configuration)
        if candidate.data_identifier not in {m.data_identifier for m in managers.values()}:
            managers[configuration] = candidate
    return managers


def _checked_cases(
    name: str,
    source: Path,
    manager: PlansManager,
    plans_name: str,
    dataset_json: dict[str, Any],
    num_processes: int,
    show_progress: bool,
) -> list[Case]:
    try:
        taken = set(training_ids(name, plans_name))
    except FileNotFoundError:  # plans that were transferred to a dataset without training cases
        taken = set()
    cases, problems = collect_cases(source, dataset_json["file_ending"], taken)
    jobs = [(c, manager.image_reader_writer_class, tuple(channel_names(dataset_json))) for c in cases]
    results = run_all(check_case, jobs, num_processes, "Checking images", show_progress)
    for index, found in sorted(results, key=itemgetter(0)):
        problems += [f"{cases[index].identifier}: {found.message}"] if isinstance(found, Failure) else found
    if problems:
        raise BadImagesError(source, problems)
    return cases


def plans_fingerprint(manager: PlansManager, configuration: ConfigurationManager) -> str:
    """Changes when anything in the plans does that a preprocessed image depends on."""
    keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
    keys += ("resampling_fn_data", "resampling_fn_data_kwargs")
    content = [
        {k: configuration.configuration.get(k) for k in keys},
        manager.plans["image_reader_writer"],
        manager.transpose_forward,
        manager.plans.get("foreground_intensity_properties_per_channel"),
    ]
    return _hash(content)


def _fingerprint(case: Case, plans: str) -> str:
    """Changes when the image files do, or the fingerprint of the plans."""
    return _hash([[(Path(f).name, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in case.files], plans])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def made_with_other_plans(folder: Path, identifiers: Iterable[str], plans: str) -> list[str]:
    """Which preprocessed cases of a folder were not made with the plans of this :func:`plans_fingerprint`."""
    return [i for i in identifiers if _properties(folder, i).get(PLANS_MARK) != plans]


def _properties(folder: Path, identifier: str) -> dict[str, Any]:
    """Of a preprocessed case; empty if they are absent, or damaged in whatever way."""
    try:
        with open(folder / f"{identifier}.pkl", "rb") as handle:
            return pickle.load(handle)
    except Exception:
        return {}


def _is_done(folder: Path, identifier: str, mark: str) -> bool:
    made = _properties(folder, identifier).get(SOURCE_KEY) == mark
    return made and (folder / f"{identifier}.b2nd").is_file()


def _preprocess(
    cases: list[Case],
    marks: dict[str, str],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    folder: Path,
    num_processes: int,
    show_progress: bool,
) -> None:
    """Preprocess cases in parallel. One that fails does not stop the others."""
    folder.mkdir(parents=True, exist_ok=True)
    # A folder inside the target is on the same file system, as the final renaming needs, and nnU-Net lists files only.
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as scratch:
        jobs = [(c, marks[c.identifier], plans, configuration, dataset_json, folder, Path(scratch)) for c in cases]
        results = run_all(_preprocess_case, jobs, num_processes, f"Preprocessing {configuration}", show_progress)
        failed = {cases[i].identifier: r for i, r in sorted(results, key=itemgetter(0)) if isinstance(r, Failure)}
    if failed:
        lines = "\n".join(f"  - {i}: {f.message}" for i, f in failed.items())
        raise PreprocessingError(
            f"{len(failed)} of {len(cases)} cases failed for {configuration}; the others are in {folder}:\n{lines}"
        ) from RuntimeError(next(iter(failed.values())).traceback)


def _preprocess_case(
    case: Case,
    mark: str,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    folder: Path,
    scratch: Path,
) -> None:
    """Run in a worker process."""
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    preprocessor = manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(list(case.files), None, plans_manager, manager, dataset_json)
    data = data.astype(np.float32, copy=False)
    # nnU-Net's loader reads the key unconditionally; there are no locations of classes to sample from.
    made_with = plans_fingerprint(plans_manager, manager)
    properties = {**properties, "class_locations": {}, SOURCE_KEY: mark, PLANS_MARK: made_with}
    blocks, chunks = comp_blosc2_params(data.shape, tuple(manager.patch_size), data.itemsize)
    # save_case insists on a segmentation; this one voxel is not published.
    nothing = np.zeros((1, 1, 1, 1), np.int8)
    nnUNetDatasetBlosc2.save_case(
        data,
        nothing,
        properties,
        str(scratch / case.identifier),
        chunks=chunks,
        blocks=blocks,
        chunks_seg=nothing.shape,
        blocks_seg=nothing.shape,
    )
    # The .pkl is the mark of a finished case: the old one goes first, the new one comes last.
    (folder / f"{case.identifier}.pkl").unlink(missing_ok=True)
    for ending in (".b2nd", ".pkl"):
        os.replace(scratch / (case.identifier + ending), folder / (case.identifier + ending))
