"""Finds the cases of a folder of images and says everything that is wrong with them before any work starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter


@dataclass(frozen=True)
class Case:
    """Image files of one case, in the order of the channels."""

    identifier: str
    files: tuple[str, ...]


class BadImagesError(ValueError):
    """Images that cannot be preprocessed. The message lists all problems of all cases."""

    def __init__(self, folder: Path, problems: Sequence[str]) -> None:
        lines = "\n".join(f"  - {p}" for p in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} with the images in {folder}; nothing was written:\n{lines}")
        self.folder = folder
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type, tuple[Path, tuple[str, ...]]]:
        return type(self), (self.folder, self.problems)


def collect_cases(folder: Path, file_ending: str, taken: set[str]) -> tuple[list[Case], list[str]]:
    """The cases in a folder whose files are called ``{CASE}_{XXXX}{file_ending}``, and what is wrong with the names.

    Args:
        folder: searched without its subfolders; hidden files, and files with another ending, are none of our business.
        file_ending: of the dataset, such as ``.nii.gz``.
        taken: ids of training cases, which a case without labels must not have.

    Returns:
        Cases sorted by id, problems.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no file with this ending.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist. Put the images without labels there, or name their folder with -i."
        )
    names = sorted(
        f.name for f in folder.iterdir() if f.name.endswith(file_ending) and f.name[0] != "." and f.is_file()
    )
    if not names:
        raise FileNotFoundError(f"{folder} holds no file that ends in {file_ending}, the file_ending of the dataset.")
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    channels: dict[str, list[int]] = {}
    problems = []
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            problems.append(f"{name}: is not called {{CASE}}_{{XXXX}}{file_ending} with the channel as four digits")
        else:
            channels.setdefault(match.group(1), []).append(int(match.group(2)))
    cases = []
    for identifier, present in sorted(channels.items()):
        gaps = sorted(set(range(max(present))) - set(present))
        if gaps:
            missing = [f"{identifier}_{c:04d}{file_ending}" for c in gaps]
            problems.append(f"{identifier}: missing {', '.join(missing)}")
        if identifier in taken:
            problems.append(f"{identifier}: is already the id of a training case; rename the files, or remove them")
        files = [folder / f"{identifier}_{c:04d}{file_ending}" for c in sorted(present)]
        cases.append(Case(identifier, tuple(map(str, files))))
    return cases, problems


def check_case(case: Case, reader: type[BaseReaderWriter], channel_names: Sequence[str]) -> list[str]:
    """What is wrong with the content of the files of a case.

    Args:
        case: files to read, each on its own: nnU-Net's readers stop at the first difference between them.
        reader: nnU-Net's reader of the dataset. A file of several channels (an RGB image) counts as so many.
        channel_names: of the dataset.
    """
    problems, read = [], []
    for file in case.files:
        name = Path(file).name
        try:
            # Values beyond float32 become Inf, which is reported below.
            with np.errstate(over="ignore", invalid="ignore"):
                data, properties = reader().read_images((file,))
        except Exception as error:  # readers raise whatever their library does; to the user it is all the same
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problems.append(f"{name}: cannot be read ({lines[-1] if lines else type(error).__name__})")
            continue
        problems += [f"{name}: {p}" for p in _value_problems(data if data.size == 0 else _raw_values(file, data))]
        geometry = _geometry(data, properties)
        if not np.all(np.isfinite(geometry["spacing"])) or np.any(np.asarray(geometry["spacing"]) <= 0):
            problems.append(f"{name}: spacing {geometry['spacing']} is not positive")
        read.append((name, data.shape[0], geometry, data.size > 0 and not np.any(data)))
    if len(read) < len(case.files):
        return problems
    found = sum(channels for _, channels, _, _ in read)
    if found != len(channel_names):
        files = ", ".join(name for name, *_ in read)
        problems.append(
            f"{case.identifier}: has {found} channel(s) ({files}), but the dataset has {len(channel_names)} "
            f"({', '.join(channel_names)})"
        )
    if all(zero for *_, zero in read):
        problems.append(f"{case.identifier}: holds nothing but zeros")
    first_name, _, first, _ = read[0]
    for name, _, geometry, _ in read[1:]:
        problems += [
            f"{case.identifier}: {name} and {first_name} differ in {key} ({geometry[key]} and {first[key]})"
            for key in first
            if not _same(geometry.get(key), first[key])
        ]
    return problems


def _raw_values(file: str, data: np.ndarray) -> np.ndarray:
    """Values in the file. ITK silently turns NaN and Inf in NIfTI files into 0, so those are looked at with nibabel."""
    if not file.endswith((".nii", ".nii.gz")):
        return data
    image = nibabel.load(file)
    return image.dataobj.get_unscaled() if image.get_data_dtype().kind == "f" else data


def _value_problems(data: np.ndarray) -> list[str]:
    if data.size == 0:
        return [f"has no voxels (shape {tuple(data.shape[1:])})"]
    counts = {"NaN": int(np.isnan(data).sum()), "Inf": int(np.isinf(data).sum())}
    return [f"holds {n} {kind} voxel(s)" for kind, n in counts.items() if n]


def _geometry(data: np.ndarray, properties: dict[str, Any]) -> dict[str, list]:
    """Shape and spacing (always), origin, direction or affine (if the reader knows them)."""
    geometry = {"shape": list(data.shape[1:]), "spacing": [float(s) for s in properties["spacing"]]}
    for key in ("origin", "direction"):
        if key in properties.get("sitk_stuff", {}):
            geometry[key] = list(properties["sitk_stuff"][key])
    if "nibabel_stuff" in properties:
        geometry["affine"] = np.asarray(properties["nibabel_stuff"]["original_affine"]).round(6).tolist()
    return geometry


def _same(a: list | None, b: list) -> bool:
    # 1e-3 (mm, for the origin) is the rounding of headers, far below a voxel.
    return a is not None and np.shape(a) == np.shape(b) and bool(np.allclose(a, b, rtol=1e-5, atol=1e-3))
