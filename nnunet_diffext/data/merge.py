"""Several raw datasets become one, whose labels are the union of theirs: ``nnunet_diffext merge``.

A label that a source never annotated is not background in its cases. Stock nnU-Net cannot know; trainers of this
package read it from ``dataset.json["diffext"]`` of the merged dataset, see :mod:`nnunet_diffext.data.modalities`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from nnunetv2 import paths
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_diffext.data.dataset import dataset_name, nnunet_folder
from nnunet_diffext.data.merge_files import Place, place_images, place_labeled
from nnunet_diffext.data.merge_labels import LabelMapping, LabelUnion, unite
from nnunet_diffext.data.merge_sources import Source, common_channels, common_format, read_source, reader_entry
from nnunet_diffext.data.modalities import check_name, modalities_of
from nnunet_diffext.data.parallel import Failure, run_all
from nnunet_diffext.data.splits import SPLITS_FILE, load_split, number_of_folds
from nnunet_diffext.files import new_folder, write_atomically

SHOWN = 20
"""Problems in a message; most of the time all cases have the same one."""


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_datasets` made.

    Attributes:
        folder: of the merged dataset in ``nnUNet_raw``.
        dataset_json: its ``dataset.json``.
        sources: the datasets it is made of.
        classes: per source, its annotated labels under their new names.
        splits: file with the merged folds, if there is one.
        splits_note: what is in it, or why there is none.
    """

    folder: Path
    dataset_json: dict[str, Any]
    sources: tuple[Source, ...]
    classes: dict[str, tuple[str, ...]]
    splits: Path | None
    splits_note: str


def merge_datasets(
    names_or_ids: Sequence[str | int],
    modalities: Sequence[str],
    target: int,
    name: str,
    *,
    labels: LabelMapping | None = None,
    copy: bool = False,
    num_processes: int | None = None,
    show_progress: bool = True,
) -> MergeReport:
    """Make ``nnUNet_raw/Dataset{target}_{name}`` out of several datasets there. It appears complete or not at all.

    Args:
        names_or_ids: the datasets. Their order is that of labels and experts.
        modalities: one per dataset; several may share one.
        target: number of the merged dataset; no dataset may have it.
        name: its name.
        labels: dataset -> label -> new name, ``None`` (background, and no longer annotated) or ``"ignore"``.
        copy: copy files that need not change, instead of linking them.
        num_processes: default: nnU-Net's, which is ``nnUNet_def_n_proc`` or 8. One works in this process.
        show_progress: progress bar.

    Raises:
        ValueError: a wrong call, or datasets that do not fit together. FileNotFoundError: files that are missing.
    """
    names = [dataset_name(n) for n in names_or_ids]
    _check_call(names, modalities, num_processes)
    folder = nnunet_folder("nnUNet_raw") / _target_name(target, name, names)
    sources = [read_source(n, modality) for n, modality in zip(names, modalities, strict=True)]
    union = unite({source.name: source.labels for source in sources}, labels or {})
    taught = _taught(sources, union)
    sources = [_with_references_of_use(source, union, taught) for source in sources]
    channels, (ending, reader) = common_channels(sources), common_format(sources)
    dataset_json = {
        "channel_names": {str(index): channel for index, channel in enumerate(channels)},
        "labels": union.labels,
        "numTraining": sum(len(source.cases) for source in sources),
        "file_ending": ending,
        **reader_entry(ending, reader),
        "name": name,
        "diffext": _modalities(sources, union),
    }
    modalities_of(dataset_json)
    splits, note = _merged_splits(sources)
    with new_folder(folder) as unfinished:
        place = Place(unfinished, folder, ending, reader, copy)
        _place_cases(sources, union, place, num_processes or default_num_processes, show_progress)
        write_atomically(unfinished / "dataset.json", json.dumps(dataset_json, indent=2, ensure_ascii=False))
        file = _write_splits(splits, folder.name) if splits else None
    classes = {source.name: tuple(dict.fromkeys(union.classes[source.name].values())) for source in sources}
    return MergeReport(folder, dataset_json, tuple(sources), classes, file, note)


def _check_call(names: Sequence[str], modalities: Sequence[str], num_processes: int | None) -> None:
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Name at least two different datasets to merge, not {', '.join(names)}.")
    if len(modalities) != len(names):
        raise ValueError(
            f"{len(names)} datasets ({', '.join(names)}), but {len(modalities)} modalities ({', '.join(modalities)}). "
            "Give one modality per dataset, in the same order; datasets may share one."
        )
    for modality in modalities:
        check_name(modality, "--modality")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"The number of processes must be at least 1, not {num_processes}.")


def _target_name(number: int, name: str, sources: Sequence[str]) -> str:
    if not 1 <= number <= 999:
        raise ValueError(f"The number of a dataset is between 1 and 999, not {number}.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{name!r} is no name of a dataset. Use letters, digits, '-' and '_'.")
    prefix = f"Dataset{number:03d}_"
    taken = [str(n) for n in find_candidate_datasets(number)]
    if any(source.startswith(prefix) for source in sources):
        raise ValueError(f"{number} is one of the datasets to merge. Choose a free number with -o.")
    if taken:
        raise ValueError(
            f"The number {number} is taken by {', '.join(taken)} in nnUNet_raw, nnUNet_preprocessed or nnUNet_results, "
            "which is not overwritten. Choose a free number with -o, or remove it from all three folders."
        )
    return prefix + name


def _modalities(sources: Sequence[Source], union: LabelUnion) -> dict[str, Any]:
    """``modalities`` of all cases, and ``annotated``: per modality all that is annotated in any of its cases, per case
    only where a case has less."""
    modality_of, listed = {}, _taught(sources, union)
    by_modality = dict(listed)
    for source in sources:
        for case in (*source.cases, *source.unlabeled, *source.test):
            modality_of[source.new_id(case.identifier)] = source.modality
        for case in source.annotated:
            # what no training case teaches is not asked of a test case either
            classes = _annotated(source, union, case) & by_modality[source.modality]
            if classes and classes != by_modality[source.modality]:
                listed[source.new_id(case)] = classes
    return {
        "modalities": modality_of,
        "annotated": {key: [label for label in union.labels if label in classes] for key, classes in listed.items()},
        "merged_from": {source.number: source.name for source in sources},
    }


def _taught(sources: Sequence[Source], union: LabelUnion) -> dict[str, set[str]]:
    """Per modality, the classes that are annotated in at least one of its training cases."""
    found: dict[str, set[str]] = {}
    for source in sources:
        for case in source.cases:
            found.setdefault(source.modality, set()).update(_annotated(source, union, case.identifier))
    return found


def _with_references_of_use(source: Source, union: LabelUnion, taught: Mapping[str, set[str]]) -> Source:
    """Without references in which nothing is annotated that could be predicted."""
    known = {case for case in source.test_label_files if _annotated(source, union, case) & taught[source.modality]}
    return replace(source, test_label_files={case: source.test_label_files[case] for case in known})


def _annotated(source: Source, union: LabelUnion, case: str) -> set[str]:
    """Classes of a case; one that several labels make up must have all of them annotated."""
    classes = union.classes[source.name]
    return set(classes.values()) - {name for label, name in classes.items() if label not in source.annotated[case]}


def _place_cases(
    sources: Sequence[Source], union: LabelUnion, place: Place, processes: int, show_progress: bool
) -> None:
    jobs, extra = [], []  # with and without labels
    for source in sources:
        parts = ("Tr", source.cases, source.label_files), ("Ts", source.test, source.test_label_files)
        for part, cases, labels in (*parts, ("Tu", source.unlabeled, {})):
            for case in cases:
                new = source.new_id(case.identifier)
                if case.identifier in labels:
                    label, values = labels[case.identifier], union.values[source.name]
                    jobs.append((place, part, new, case.files, label, values))
                else:
                    extra.append((place, f"images{part}", new, case.files))
    subfolders = {job[1] for job in extra}.union(*({f"images{job[1]}", f"labels{job[1]}"} for job in jobs))
    for subfolder in sorted(subfolders):
        (place.folder / subfolder).mkdir()
    problems = list(_problems(jobs, run_all(place_labeled, jobs, processes, "Labelled cases", show_progress)))
    if extra and not problems:
        results = sorted(
            run_all(place_images, extra, processes, "Images without labels", show_progress), key=itemgetter(0)
        )
        problems = [f"{extra[index][2]}: {found.message}" for index, found in results if isinstance(found, Failure)]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{len(problems)} case(s) cannot be merged; nothing was written:\n{lines}{more}")


def _problems(jobs: Sequence[tuple], results: Iterator[tuple[int, Any]]) -> Iterator[str]:
    for index, found in sorted(results, key=itemgetter(0)):
        _, _, case, _, file, values = jobs[index]
        if isinstance(found, Failure):
            yield f"{case}: {found.message}"
        elif found:
            yield f"{file}: holds {', '.join(map(str, found))}, but its dataset.json knows {sorted(values)} only"


def _merged_splits(sources: Sequence[Source]) -> tuple[list[dict[str, list[str]]], str]:
    """Fold k is the union of the folds k, so that a model of all can be compared with one model per dataset."""
    own = "nnU-Net will make its own folds"
    if not paths.nnUNet_preprocessed.is_set():
        return [], f"nnUNet_preprocessed is not set; {own}."
    folders = {source.name: nnunet_folder("nnUNet_preprocessed") / source.name for source in sources}
    counts = {name: number_of_folds(folder) for name, folder in folders.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        return [], f"the sources differ in the folds of their {SPLITS_FILE} or have none ({listed}); {own}."
    merged = []
    for fold in range(next(iter(counts.values()))):
        entry: dict[str, list[str]] = {"train": [], "val": [], "unlabeled": []}
        for source in sources:
            split = load_split(folders[source.name], fold)
            known = {case.identifier for case in (*source.cases, *source.unlabeled)}
            unknown = sorted({*split.train, *split.val, *split.unlabeled} - known)
            if unknown:
                return [], f"{SPLITS_FILE} of {source.name} names {unknown}, which nnUNet_raw does not have; {own}."
            for key, ids in entry.items():
                ids += [source.new_id(case) for case in getattr(split, key)]
        merged.append({key: ids for key, ids in entry.items() if ids or key != "unlabeled"})
    return merged, f"{len(merged)} folds, each the union of the sources' folds of the same number"


def _write_splits(splits: Sequence[Mapping[str, Sequence[str]]], dataset: str) -> Path:
    # Not into nnUNet_raw: nnU-Net would copy it from there, but stop whenever the copy was changed.
    folder = nnunet_folder("nnUNet_preprocessed") / dataset
    with new_folder(folder) as unfinished:
        write_atomically(unfinished / SPLITS_FILE, json.dumps(splits, indent=4))
    return folder / SPLITS_FILE
