"""What :mod:`nnunet_diffext.data.merge` must know about a dataset, and what several must have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    determine_reader_writer_from_file_ending,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ZScoreNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_diffext.data.dataset import channel_names, load_json, nnunet_folder
from nnunet_diffext.data.image_checks import BadImagesError, Case, collect_cases
from nnunet_diffext.data.merge_files import CONVERTED_TO, CONVERTIBLE
from nnunet_diffext.data.merge_labels import source_labels
from nnunet_diffext.data.modalities import Modalities, modalities_of


@dataclass(frozen=True)
class Source:
    """One of the datasets to merge.

    Attributes:
        name: ``Dataset001_X``.
        modality: of all its cases.
        labels: label -> value, see :func:`~nnunet_diffext.data.merge_labels.source_labels`.
        channels: their names.
        ending: of its files.
        reader: nnU-Net's, for these files.
        reader_is_chosen: by ``overwrite_image_reader_writer``.
        flat: a dataset of pictures or single slices, judged by its first case.
        cases: labelled ones.
        label_files: id -> file.
        unlabeled: those of ``imagesTu``.
        test: those of ``imagesTs``. If one has the id of another case, all ids here begin with ``test_``.
        test_label_files: id -> file, for the test cases that have one in ``labelsTs``.
        annotated: id -> labels that are annotated in this case, if its own ``dataset.json`` says so; else all. For all
            labelled cases and all test cases.
    """

    name: str
    modality: str
    labels: dict[str, int]
    channels: tuple[str, ...]
    ending: str
    reader: type[BaseReaderWriter]
    reader_is_chosen: bool
    flat: bool
    cases: tuple[Case, ...]
    label_files: dict[str, str]
    unlabeled: tuple[Case, ...]
    test: tuple[Case, ...]
    test_label_files: dict[str, str]
    annotated: dict[str, frozenset[str]]

    @property
    def number(self) -> str:
        """``Dataset001_X`` -> ``001``."""
        return self.name.removeprefix("Dataset")[:3]

    def new_id(self, case: str) -> str:
        """``case`` of ``Dataset001_X`` -> ``001_case``: ids never clash, and a result can be traced to its image."""
        return f"{self.number}_{case}"


def read_source(name: str, modality: str) -> Source:
    """Look at a dataset in ``nnUNet_raw``: its ``dataset.json``, the names of its files and its first case.

    Raises:
        ValueError: something in it cannot be merged; the message names the dataset.
        FileNotFoundError: no ``dataset.json`` or no images.
        BadImagesError: wrong names in ``imagesTr``, ``imagesTu`` or ``imagesTs``, missing channels.
    """
    folder = nnunet_folder("nnUNet_raw") / name
    dataset_json = load_json(folder / "dataset.json", "Datasets are merged from nnUNet_raw: put the raw data there.")
    try:
        return _read(folder, dataset_json, modality)
    except BadImagesError:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read(folder: Path, dataset_json: dict[str, Any], modality: str) -> Source:
    missing = [key for key in ("labels", "file_ending") if key not in dataset_json]
    if missing or not channel_names(dataset_json):
        raise ValueError(f"its dataset.json has no {', '.join(missing or ['channel_names'])}, which nnU-Net needs.")
    labels, partial = source_labels(dataset_json), modalities_of(dataset_json)
    if len(partial.names) > 1:
        raise ValueError(
            f"has several modalities of its own ({', '.join(partial.names)}). Merge the datasets that it was made of "
            "together with the other ones, in one call."
        )
    cases, label_files = _labeled_cases(folder, dataset_json)
    ending = dataset_json["file_ending"]
    extra = folder / "imagesTu"
    has_extra = extra.is_dir() and any(extra.iterdir())
    unlabeled = _cases_of(extra, ending, set(label_files)) if has_extra else []
    test = _test_cases(folder / "imagesTs", ending, len(cases[0].files))
    taken = {*label_files, *(case.identifier for case in unlabeled)}
    prefix = "test_" if any(case.identifier in taken for case in test) else ""
    references = {case.identifier: folder / "labelsTs" / f"{case.identifier}{ending}" for case in test}
    channels = tuple(channel_names(dataset_json))
    reader, first_shape = _open_first(dataset_json, cases[0])
    if first_shape[0] != len(channels):
        raise ValueError(
            f"its dataset.json names {len(channels)} channel(s) ({', '.join(channels)}), but {cases[0].identifier} has "
            f"{first_shape[0]} ({', '.join(Path(f).name for f in cases[0].files)})."
        )
    return Source(
        folder.name,
        modality,
        labels,
        channels,
        ending,
        reader,
        dataset_json.get("overwrite_image_reader_writer", "None") != "None",
        first_shape[1] == 1,
        tuple(cases),
        label_files,
        tuple(unlabeled),
        tuple(Case(f"{prefix}{case.identifier}", case.files) for case in test),
        {f"{prefix}{case}": str(file) for case, file in references.items() if file.is_file()},
        {f"{prefix}{case.identifier}": _names(partial, _annotated_in_test(partial, case.identifier)) for case in test}
        | {case: _names(partial, partial.annotated(case)) for case in label_files},
    )


def _annotated_in_test(partial: Modalities, case: str) -> tuple[bool, ...]:
    """No training reads the modality of a test case, so that many files do not give it."""
    listed = case in partial.of_case or not partial.of_case
    return partial.annotated(case) if listed else partial.classes(partial.names[0])


def _names(partial: Modalities, annotated: tuple[bool, ...]) -> frozenset[str]:
    return frozenset(label for label, known in zip(partial.heads, annotated, strict=True) if known)


def _labeled_cases(folder: Path, dataset_json: dict[str, Any]) -> tuple[list[Case], dict[str, str]]:
    ending = dataset_json["file_ending"]
    if "dataset" in dataset_json:
        found = get_filenames_of_train_images_and_targets(str(folder), dataset_json)
        cases = [Case(i, tuple(entry["images"])) for i, entry in sorted(found.items())]
        labels = {i: entry["label"] for i, entry in found.items()}
    else:
        if not (folder / "imagesTr").is_dir():
            raise FileNotFoundError(f"{folder / 'imagesTr'} does not exist. Put the training images there.")
        # As nnU-Net does, which starts twelve processes for it.
        cases = _cases_of(folder / "imagesTr", ending, set())
        labels = {case.identifier: str(folder / "labelsTr" / f"{case.identifier}{ending}") for case in cases}
    if not cases:
        raise ValueError('its dataset.json lists no case under "dataset".')
    files = [file for case in cases for file in (*case.files, labels[case.identifier])]
    absent = [file for file in files if not Path(file).is_file()]
    absent += [f"an image of {case.identifier}" for case in cases if not case.files]
    if absent:
        lines = "\n".join(f"  - {file}" for file in absent)
        raise ValueError(f"{len(absent)} file(s) are missing. Add them, or remove their cases:\n{lines}")
    return cases, labels


def _test_cases(folder: Path, ending: str, channels: int) -> list[Case]:
    """Whatever else lies in the folder: nnU-Net never looks at it."""
    if not any(file.name[0] != "." for file in folder.glob(f"*{ending}")):
        return []
    cases, problems = collect_cases(folder, ending, set())
    wrong = [case for case in cases if len(case.files) != channels]
    problems += [f"{c.identifier}: has {len(c.files)} file(s), a training case {channels}" for c in wrong]
    if problems:
        raise ValueError(f"{BadImagesError(folder, problems)}\nOr move {folder} away; merge can do without.")
    return cases


def _cases_of(folder: Path, ending: str, taken: set[str]) -> list[Case]:
    cases, problems = collect_cases(folder, ending, taken)
    if problems:
        raise BadImagesError(folder, problems)
    return cases


def _open_first(dataset_json: dict[str, Any], case: Case) -> tuple[type[BaseReaderWriter], tuple[int, ...]]:
    """Reader of the dataset and shape ``(C, Z, Y, X)`` of a case."""
    try:
        reader = determine_reader_writer_from_dataset_json(dataset_json, case.files[0], verbose=False)
        return reader, reader().read_images(case.files)[0].shape
    except Exception as error:  # readers raise whatever their library does; to the user it is all the same
        raise ValueError(f"{case.identifier} cannot be read: {error}") from error


def common_channels(sources: Sequence[Source]) -> list[str]:
    """Names of the channels of the merged dataset.

    nnU-Net chooses the normalisation by this name, the same one for all modalities: ``CT`` clips and scales with the
    intensities of the whole dataset, which is right for CT alone. Where names differ, ``image`` gets the z-score of
    every image by itself.

    Raises:
        ValueError: the datasets differ in their number of channels.
    """
    counts = {source.name: len(source.channels) for source in sources}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(
            f"nnU-Net needs as many channels in one case as in any other, but {listed}. Merge datasets with the same "
            "number only, or make a copy of the larger ones without the channels that the others lack."
        )
    names = []
    for index, channel in enumerate(zip(*(source.channels for source in sources), strict=True)):
        schemes = {get_normalization_scheme(name) for name in channel}
        if len(set(channel)) > 1 and (len(schemes) > 1 or schemes == {ZScoreNormalization}):
            names.append("image" if len(sources[0].channels) == 1 else f"image{index}")
        else:
            names.append(channel[0])
    return names


def common_format(sources: Sequence[Source]) -> tuple[str, type[BaseReaderWriter]]:
    """File ending and reader of the merged dataset. Volumes with different endings become ``.nii.gz``.

    Raises:
        ValueError: formats that cannot be converted, or 2D and 3D, or different readers for one format.
    """
    endings = dict.fromkeys(source.ending for source in sources)
    listed = ", ".join(f"{s.name}: {s.ending}, {'2D' if s.flat else '3D'}, {s.reader.__name__}" for s in sources)
    if len({source.flat for source in sources}) > 1:
        raise ValueError(f"2D and 3D datasets cannot be merged ({listed}). Cut the volumes into slices first.")
    if any(source.reader is Tiff3DIO for source in sources):
        raise ValueError(f"3D TIFF files do not hold their spacing ({listed}). Convert them to {CONVERTED_TO} first.")
    ending = next(iter(endings)) if len(endings) == 1 else CONVERTED_TO
    if len(endings) > 1 and any(e not in CONVERTIBLE for e in endings):
        raise ValueError(
            f"The files have different formats ({listed}), of which only {', '.join(CONVERTIBLE)} are converted. "
            "Convert the others so that all datasets have the same format."
        )
    # What is converted needs no reader of its own format any more, unless somebody asked for it.
    readers = {s.reader for s in sources if s.ending == ending or s.reader_is_chosen} or {SimpleITKIO}
    if len(readers) > 1:
        raise ValueError(
            f"nnU-Net reads these files with different classes ({listed}), which may turn axes differently. Write the "
            'same "overwrite_image_reader_writer" into the dataset.json of all of them.'
        )
    return ending, readers.pop()


def reader_entry(ending: str, reader: type[BaseReaderWriter]) -> dict[str, str]:
    """What makes nnU-Net use this reader: nothing if it does so anyway."""
    default = determine_reader_writer_from_file_ending(ending, verbose=False)
    return {} if default is reader else {"overwrite_image_reader_writer": reader.__name__}
