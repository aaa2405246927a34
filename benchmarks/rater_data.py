"""Synthetic volumes with raters of known distribution: what benchmarks/raters.py trains on.

Every volume holds a ball whose core every rater marks, a shell that a rater marks as a whole or not at all, and a blob
of which the same is true. How often they are marked follows from their brightness, so P(y | x) is known in every voxel;
a training case shows one rater's answer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from common import CONFIGURATION, PLANS, load_json, prepare_dataset, save_json, shrink
from scipy.ndimage import gaussian_filter

from nnunet_diffext.demo.commands import nnunet_environment

DATASET = "Dataset950_Raters"
SIZE, TRAIN, TEST, FOLDS = 32, 60, 30, 5


def make_case(seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (float32), the true probability of the foreground (float32) and one rater's mask (uint8), each 32^3."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), axis=-1).astype(float)
    grid = grid + 1.5 * np.stack([gaussian_filter(rng.normal(size=(SIZE,) * 3), 4) * 40 for _ in range(3)], axis=-1)
    centre = rng.uniform(13, 19, size=3)
    distance = np.linalg.norm(grid - centre, axis=-1)
    radius = rng.uniform(4.5, 6.5)
    core, shell = distance <= radius, (distance > radius) & (distance <= radius + rng.uniform(1.5, 3.5))
    direction = rng.normal(size=3)
    blob_centre = centre + direction / np.linalg.norm(direction) * rng.uniform(11, 12.5)
    blob = (np.linalg.norm(grid - blob_centre, axis=-1) <= rng.uniform(2.5, 4)) & ~core & ~shell
    image, truth, mask = np.zeros((SIZE,) * 3), np.zeros((SIZE,) * 3), np.zeros((SIZE,) * 3, dtype=np.uint8)
    image[core], truth[core], mask[core] = 1.0, 1.0, 1
    for part in (shell, blob):
        brightness = rng.uniform(0.15, 0.75)
        probability = (brightness - 0.15) / 0.6
        image[part], truth[part] = brightness, probability
        mask[part] = rng.random() < probability
    image = gaussian_filter(image, 0.6) + rng.normal(0, 0.25, size=image.shape)
    return image.astype(np.float32), truth.astype(np.float32), mask


def write(array: np.ndarray, path: Path) -> None:
    """As an image of unit spacing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def prepare(work: Path) -> dict[str, str]:
    """Data, plans, preprocessing and splits below ``work``, each made once. Returns the environment for commands."""
    env = nnunet_environment(work)
    raw = Path(env["nnUNet_raw"]) / DATASET
    if not (raw / "dataset.json").is_file():
        for group, count in (("Tr", TRAIN), ("Ts", TEST)):
            for index in range(count):
                image, truth, mask = make_case((group == "Ts", index))
                case = f"case_{index:03d}"
                write(image, raw / f"images{group}" / f"{case}_0000.nii.gz")
                write(mask, raw / f"labels{group}" / f"{case}.nii.gz")
                write(truth, raw / f"truth{group}" / f"{case}.nii.gz")
        content = {
            "channel_names": {"0": "synthetic"}, "labels": {"background": 0, "object": 1}, "numTraining": TRAIN,
            "file_ending": ".nii.gz",
        }  # fmt: skip
        save_json(content, raw / "dataset.json")
    folder = prepare_dataset(DATASET, env, work / "logs", edit_plans)
    if not (folder / "splits_final.json").is_file():
        cases = [f"case_{i:03d}" for i in range(TRAIN)]
        folds = [cases[k::FOLDS] for k in range(FOLDS)]
        splits = [{"train": [c for c in cases if c not in val], "val": val} for val in folds]
        save_json(splits, folder / "splits_final.json")
    return env


def edit_plans(file: Path) -> None:
    """A small network; a second plans file of it has dropout."""
    shrink(file, [SIZE] * 3, (8, 16, 32, 64), ([1] * 3, *[[2] * 3] * 3))
    plans = load_json(file)
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    kwargs.update(dropout_op="torch.nn.modules.dropout.Dropout3d", dropout_op_kwargs={"p": 0.1, "inplace": False})
    plans["plans_name"] = f"{PLANS}Dropout"
    save_json(plans, file.with_name(f"{PLANS}Dropout.json"))
