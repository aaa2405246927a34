"""Synthetic patients in three modalities, partly annotated, and the left atrium as a fourth (benchmarks/modalities.py).

All patients have a liver with a lesion, a spleen and kidneys. What a source never annotated is background in its files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from common import CONFIGURATION, PLANS, load_json, prepare_dataset, save_json, shrink

from nnunet_diffext.demo.commands import run_command
from nnunet_diffext.demo.synthetic import FILE_ENDING, LABELS, make_case

TRAIN, VAL, TEST = 12, 2, 10
THREE, FOUR = "Dataset970_ThreeModalities", "Dataset971_FourModalities"


def as_ct(image: np.ndarray) -> np.ndarray:
    return image


def as_mr(image: np.ndarray) -> np.ndarray:
    """Dark is bright, and faint contrasts are stronger."""
    return 300 * np.sqrt(np.clip(260 - image, 0, 260) / 260)


def as_ce(image: np.ndarray) -> np.ndarray:
    """Everything around the intensity of the liver is stretched, the rest is saturated."""
    return 200 / (1 + np.exp(-(image - 115) / 18))


@dataclass(frozen=True)
class Source:
    """One dataset: its name, modality, how its images look, and which labels it has."""

    name: str
    modality: str
    look: Callable[[np.ndarray], np.ndarray]
    labels: tuple[str, ...]


SOURCES = (
    Source("Dataset960_CTUpper", "CT", as_ct, ("liver", "spleen")),
    Source("Dataset961_CTKidneys", "CT", as_ct, ("kidneys",)),
    Source("Dataset962_MR", "MR", as_mr, ("liver", "kidneys")),
    Source("Dataset963_ContrastMR", "CEMR", as_ce, ("liver", "lesion")),
)
ATRIUM = "Dataset966_LeftAtrium"
ATRIUM_LABEL, ATRIUM_MODALITY = "left atrium", "LGE"


def labels_of(modality: str) -> list[str]:
    """What is asked for in the test images of a modality: everything that one of its sources annotated."""
    if modality == ATRIUM_MODALITY:
        return [ATRIUM_LABEL]
    return list(dict.fromkeys(label for s in SOURCES if s.modality == modality for label in s.labels))


def write(array: np.ndarray, spacing: tuple[float, ...], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(spacing)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_source(source: Source, number: int, raw: Path) -> None:
    """Training cases with the labels of the source. A lesion that it does not annotate is liver."""
    values = {label: index + 1 for index, label in enumerate(source.labels)}
    for index in range(TRAIN + VAL):
        image, labels, spacing = make_case((7, number, index))
        if "lesion" not in values:
            labels[labels == LABELS["lesion"]] = LABELS["liver"]
        kept = np.zeros_like(labels)
        for label, value in values.items():
            kept[labels == LABELS[label]] = value
        case = f"case_{index:03d}"
        write(source.look(image.astype(float)).astype(np.float32), spacing, raw / f"imagesTr/{case}_0000{FILE_ENDING}")
        write(kept, spacing, raw / f"labelsTr/{case}{FILE_ENDING}")
    content = {
        "channel_names": {"0": "image"}, "labels": {"background": 0, **values}, "numTraining": TRAIN + VAL,
        "file_ending": FILE_ENDING,
    }  # fmt: skip
    save_json(content, raw / "dataset.json")


def write_tests(root: Path) -> None:
    """Per modality, images and complete labels (values of the phantom)."""
    for source in {s.modality: s for s in SOURCES}.values():
        for index in range(TEST):
            image, labels, spacing = make_case((8, index))
            case = f"test_{index:03d}"
            look = source.look(image.astype(float)).astype(np.float32)
            write(look, spacing, root / source.modality / "images" / f"{case}_0000{FILE_ENDING}")
            write(labels, spacing, root / source.modality / "labels" / f"{case}{FILE_ENDING}")


def link_atrium(data: Path, raw: Path, tests: Path) -> None:
    """Sixteen volumes of the real dataset for training, ten for the test."""
    content = load_json(data / "dataset.json")
    for folder, numbers in ((raw, range(TRAIN + VAL)), (tests / ATRIUM_MODALITY, range(64, 64 + TEST))):
        images, labels = ("imagesTr", "labelsTr") if folder == raw else ("images", "labels")
        for number in numbers:
            for kind, file in ((images, f"la_{number:03d}_0000.nii.gz"), (labels, f"la_{number:03d}.nii.gz")):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                (folder / kind / file).symlink_to((data / (kind if folder == raw else f"{kind}Tr") / file).resolve())
    save_json({**content, "numTraining": TRAIN + VAL, "channel_names": {"0": "image"}}, raw / "dataset.json")


def split(preprocessed: Path, raw: Path) -> None:
    """One fold: all but the last cases."""
    cases = sorted(f.name[: -len(FILE_ENDING)] for f in (raw / "labelsTr").glob(f"*{FILE_ENDING}"))
    preprocessed.mkdir(parents=True, exist_ok=True)
    save_json([{"train": cases[:TRAIN], "val": cases[TRAIN:]}], preprocessed / "splits_final.json")


def edit_plans(file: Path) -> None:
    """The same network for every dataset."""
    shrink(file, (16, 48, 48), (16, 32, 64, 128), ([1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]))


def prepare(work: Path, env: dict[str, str], atrium: Path | None) -> None:
    """Data, plans and preprocessing of every dataset, each made once."""
    raw, preprocessed, logs = Path(env["nnUNet_raw"]), Path(env["nnUNet_preprocessed"]), work / "logs"
    log = logs / "prepare.log"
    if not (work / "tests" / "CT").is_dir():
        write_tests(work / "tests")
    for number, source in enumerate(SOURCES):
        if not (raw / source.name).is_dir():
            write_source(source, number, raw / source.name)
        plan(source.name, env, logs)
    sources = {s.name: s.modality for s in SOURCES}
    merge(sources, THREE, env, log)
    plan(THREE, env, logs)
    if atrium is None:
        return
    if not (raw / ATRIUM).is_dir():
        link_atrium(atrium, raw / ATRIUM, work / "tests")
    plan(ATRIUM, env, logs)
    merge({**sources, ATRIUM: ATRIUM_MODALITY}, FOUR, env, log)
    done = preprocessed / FOUR / "prepared"
    if not done.is_file():
        run_command(["nnUNetv2_extract_fingerprint", "-d", "971", "-np", "1", "--no_pbar"], env, log)
        run_command(["nnUNetv2_plan_experiment", "-d", "971"], env, log)  # it copies dataset.json
        move = ["nnUNetv2_move_plans_between_datasets", "-s", "970", "-t", "971", "-sp", PLANS, "-tp", PLANS]
        run_command(move, env, log)
        run_command(["nnUNetv2_preprocess", "-d", "971", "-c", CONFIGURATION, "-np", "1", "--no_pbar"], env, log)
        done.touch()


def merge(modalities: dict[str, str], target: str, env: dict[str, str], log: Path) -> None:
    """Through the command."""
    if (Path(env["nnUNet_raw"]) / target).is_dir():
        return
    command = ["nnunet_diffext", "merge", "-d", *modalities, "-o", target[7:10], "--name", target[11:], "-np", "1"]
    run_command([*command, "--modality", *modalities.values()], env, log)


def plan(name: str, env: dict[str, str], logs: Path) -> None:
    """Plans of the common size, preprocessing, one fold."""
    preprocessed = prepare_dataset(name, env, logs, edit_plans)
    if not (preprocessed / "splits_final.json").is_file():
        split(preprocessed, Path(env["nnUNet_raw"]) / name)
