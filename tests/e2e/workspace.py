"""A folder with everything nnU-Net keeps, and calls of its own entry points on tiny datasets in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiments,
    preprocess_dataset,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint, run_training

from nnunet_diffext.checkpoints import read_safely
from nnunet_diffext.data.unlabeled import preprocess_unlabeled
from nnunet_diffext.files import FINAL

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
CPU = torch.device("cpu")
PLANS = "nnUNetPlans"
MAIN = "Dataset801_Main"
TRAINER = "DMEDSegTrainer_1epochs_2iters_1valiters_seed1"
STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


class _Threads:
    """Stands for a spawning multiprocessing context: its workers are threads, which need not import nnU-Net again."""

    Pool = ThreadPool


def threads_instead_of_spawn(method: str | None = None) -> Any:
    """Replacement of ``multiprocessing.get_context``. The stock commands are tested with real processes."""
    return _Threads if method == "spawn" else get_context(method)


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What nnU-Net reads from the environment."""
        return {name: str(self.root / name) for name in FOLDERS}

    def raw(self, dataset: str) -> Path:
        """Folder of a dataset in ``nnUNet_raw``."""
        return self.root / "nnUNet_raw" / dataset

    def preprocessed(self, dataset: str) -> Path:
        """Folder of a dataset in ``nnUNet_preprocessed``."""
        return self.root / "nnUNet_preprocessed" / dataset

    def model(self, dataset: str, trainer: str, configuration: str = "3d_fullres", plans: str = PLANS) -> Path:
        """Folder of a trained model."""
        return self.root / "nnUNet_results" / dataset / f"{trainer}__{plans}__{configuration}"


def plan(workspace: Workspace, dataset: str, planner: str = "ExperimentPlanner", plans: str = PLANS) -> Path:
    """nnU-Net's own fingerprint and plans. Returns the plans file."""
    number = int(dataset[7:10])
    if not (workspace.preprocessed(dataset) / "dataset_fingerprint.json").exists():
        extract_fingerprint_dataset(number, num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiments([number], planner)
    return workspace.preprocessed(dataset) / f"{plans}.json"


def shrink(file: Path, patch: Sequence[int], strides: Sequence[Sequence[int]] = STRIDES) -> dict[str, Any]:
    """Edit plans down to stages of 4, 8 and 16 channels and a tiny patch; 2d gets it without its first axis."""
    plans = json.loads(file.read_text())
    for name in [n for n in ("3d_lowres", "3d_cascade_fullres") if n in plans["configurations"]]:
        del plans["configurations"][name]
    for name, configuration in plans["configurations"].items():
        axes = 2 if name == "2d" else 3
        stages = [list(s)[-axes:] for s in strides]
        configuration.update(patch_size=list(patch)[-axes:], batch_size=2)
        arguments = configuration["architecture"]["arch_kwargs"]
        kernels = [[1 if stride[0] < stride[-1] else 3, *[3] * (axes - 1)] for stride in stages]
        arguments.update(n_stages=3, features_per_stage=[4, 8, 16], strides=stages, kernel_sizes=kernels)
        for key, length in (("n_conv_per_stage", 3), ("n_blocks_per_stage", 3), ("n_conv_per_stage_decoder", 2)):
            if key in arguments:
                arguments[key] = arguments[key][:length]
    file.write_text(json.dumps(plans, indent=2))
    return plans


def add_cascade(file: Path) -> None:
    """Give plans a low resolution (half of the full one) and a cascade on top of it."""
    plans = json.loads(file.read_text())
    low = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    low.update(
        data_identifier=f"{plans['plans_name']}_3d_lowres",
        spacing=[2 * s for s in low["spacing"]],
        patch_size=[4, 8, 8],
        next_stage="3d_cascade_fullres",
    )
    plans["configurations"]["3d_lowres"] = low
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    file.write_text(json.dumps(plans, indent=2))


def preprocess(dataset: str, configurations: Sequence[str], *, unlabeled: bool, plans: str = PLANS) -> None:
    """nnU-Net's preprocessing of ``imagesTr`` and ours of ``imagesTu``."""
    number = int(dataset[7:10])
    preprocess_dataset(number, plans, configurations, [1] * len(configurations), show_progress_bar=False)
    if unlabeled:
        preprocess_unlabeled(number, plans, configurations, num_processes=1, show_progress=False)


def train(
    dataset: str,
    trainer: str,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    plans: str = PLANS,
    **options: Any,
) -> None:
    """What ``nnUNetv2_train`` calls: training and final validation, on the CPU."""
    run_training(dataset, configuration, fold, trainer, plans, device=CPU, **options)


def make_trainer(
    dataset: str, trainer: str, configuration: str = "3d_fullres", fold: int | str = 0, resume: bool = False
) -> Any:
    """The trainer as ``nnUNetv2_train`` makes it, with ``--c`` if ``resume``."""
    made = get_trainer_from_args(dataset, configuration, fold, trainer, PLANS, resume, device=CPU)
    maybe_load_checkpoint(made, resume, False)
    return made


def predict(model: Path, images: Path, output: Path, folds: Sequence[int | str] | None = (0,), **options: Any) -> Path:
    """Predict every image of a folder with a model folder, in this process."""
    output.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    predictor.predict_from_files_sequential(str(images), str(output), **options)
    return output


def check_segmentations(model: Path, images: Path, output: Path) -> None:
    """Files in ``output``: on the grid of their images, and with no other values than the model's labels."""
    labels = json.loads((model / "dataset.json").read_text())["labels"]
    known = {v for entry in labels.values() for v in ([entry] if isinstance(entry, int) else entry)}
    files = list(output.glob("*.nii.gz"))
    assert files
    for file in files:
        image = sitk.ReadImage(str(images / file.name.replace(".nii.gz", "_0000.nii.gz")))
        segmentation = sitk.ReadImage(str(file))
        assert segmentation.GetSize() == image.GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(segmentation)).tolist()) <= known


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    """What a folder of segmentations holds, by file name."""
    return {f.name: sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted(folder.glob("*.nii.gz"))}


def assert_same_files(one: Path, other: Path, count: int = 2) -> None:
    """The same segmentations under the same names."""
    a, b = segmentations(one), segmentations(other)
    assert a.keys() == b.keys() and len(a) == count
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def command(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the installed commands; a failure shows what it printed."""
    done = subprocess.run(
        [str(script(name)), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def script(name: str) -> Path:
    """Path of a command of this environment."""
    return Path(sysconfig.get_path("scripts")) / (name + (".exe" if sys.platform == "win32" else ""))


def log_of(fold: Path) -> str:
    """Text of all training logs of a fold."""
    return "".join(f.read_text() for f in sorted(fold.glob("training_log_*.txt")))


def curves(checkpoint: Path) -> dict[str, list[Any]]:
    """What was logged per epoch."""
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]


def weights(model: Path, fold: int | str = 0) -> dict[str, torch.Tensor]:
    """Of the network of a finished training."""
    return read_safely(model / f"fold_{fold}" / FINAL)["network_weights"]


def check_training(model: Path, epochs: int = 1, fold: int | str = 0) -> dict[str, list[Any]]:
    """The curves of a finished training: complete, finite, of no skipped step."""
    folder = model / f"fold_{fold}"
    logged = curves(folder / FINAL)
    assert {len(v) for v in logged.values()} == {epochs}
    assert np.isfinite([v for k, v in logged.items() if k.startswith(("train_", "val_"))]).all()
    assert "non-finite" not in log_of(folder)
    return logged
