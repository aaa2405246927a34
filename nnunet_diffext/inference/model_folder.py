"""Finding and loading a trained model; everything that can be wrong is said before any work is done."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.file_path_utilities import get_output_folder
from torch import nn

from nnunet_diffext.checkpoints import CheckpointError, read_safely
from nnunet_diffext.data.dataset import dataset_name, nnunet_folder
from nnunet_diffext.files import FINAL

STANDARD_FOLDS = (0, 1, 2, 3, 4)


def find_model_folder(
    dataset: str | int | None,
    configuration: str | None,
    trainer: str = "nnUNetTrainer",
    plans: str = "nnUNetPlans",
    model_folder: str | Path | None = None,
) -> Path:
    """The folder given, or ``<nnUNet_results>/<dataset>/<trainer>__<plans>__<configuration>``.

    Raises:
        ValueError: neither or both are given, or ``nnUNet_results`` is not set.
        FileNotFoundError: no such folder; the trained models of the dataset are listed.
    """
    if (model_folder is None) == (dataset is None):
        raise ValueError("Name the model with -d and -c (and -tr, -p), or with its folder -m; not with both.")
    if model_folder is not None:
        folder = Path(model_folder)
    else:
        if configuration is None:
            raise ValueError("-d needs the configuration as well: -c 3d_fullres, for example.")
        nnunet_folder("nnUNet_results")
        folder = Path(get_output_folder(dataset_name(dataset), trainer, plans, configuration))
    missing = [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]
    if missing:
        others = sorted(p.parent.name for p in folder.parent.glob("*__*__*/plans.json"))
        there = f" Models in {folder.parent}: {', '.join(others)}." if others else ""
        what = f"has no {' and no '.join(missing)}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The model folder {folder} {what}. Check -d, -c, -tr and -p, or give another folder with -m.{there}"
        )
    return folder


def parse_folds(folds: Sequence[int | str]) -> tuple[int | str, ...]:
    """``["0", "all"]`` -> ``(0, "all")``.

    Raises:
        ValueError: not a number, or named twice.
    """
    parsed: list[int | str] = []
    for fold in folds:
        if str(fold) != "all" and not str(fold).isdecimal():
            raise ValueError(f"Fold {fold!r} is neither a number nor 'all'.")
        parsed.append("all" if str(fold) == "all" else int(fold))
    if len(set(parsed)) != len(parsed) or not parsed:
        raise ValueError(f"Folds must be named once each; got {' '.join(map(str, parsed)) or 'none'}.")
    return tuple(parsed)


def check_folds(folder: Path, folds: Sequence[int | str], checkpoint: str) -> None:
    """Every checkpoint exists and is safe to read.

    Raises:
        CheckpointError: one is missing (those that exist are listed), damaged, or holds more than data.
    """
    missing = [f for f in folds if not (folder / f"fold_{f}" / checkpoint).is_file()]
    if missing:
        there = sorted(p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}"))
        if there:
            remedy = f"There is one for fold {', '.join(there)}: use -f {' '.join(there)}, or train the others."
        else:
            found = sorted({p.name for p in folder.glob("fold_*/*.pth")})
            remedy = f"Files there: {', '.join(found)} (choose with -chk)." if found else "Train the model first."
        raise CheckpointError(f"No {checkpoint} for fold {', '.join(map(str, missing))} in {folder}. {remedy}")
    for fold in folds:
        read_safely(folder / f"fold_{fold}" / checkpoint)  # nnU-Net's own reader would run what a malicious file holds


def check_device(name: str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: unknown, or not available here.
    """
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"-device must be cpu, cuda or mps, not {name!r}. Choose a GPU with CUDA_VISIBLE_DEVICES.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda: torch finds no GPU here. Use -device cpu, or run: nnunet_diffext doctor")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: torch has no Metal here. Use -device cpu.")
    return torch.device(name)


def load_predictor(
    folder: str | Path,
    folds: Sequence[int | str],
    *,
    checkpoint: str = FINAL,
    device: str = "cpu",
    step_size: float = 0.5,
    mirroring: bool = True,
    on_device: bool = True,
    verbose: bool = False,
) -> nnUNetPredictor:
    """nnU-Net's predictor, initialised with every fold's weights.

    Args:
        folder: model folder.
        folds: numbers or ``"all"``.
        checkpoint: file name inside of each fold's folder.
        device: ``"cuda"``, ``"cpu"`` or ``"mps"``.
        step_size: of the sliding window, relative to the patch, in (0, 1].
        mirroring: average over mirrored passes, along the axes that the training allowed.
        on_device: collect results on the device if they fit.
        verbose: nnU-Net's own messages.

    Raises:
        CheckpointError: see :func:`check_folds`. ValueError: device or step size.
    """
    if not 0 < step_size <= 1:
        raise ValueError(f"-step_size must be above 0 and at most 1; got {step_size:g}.")
    where = check_device(device)
    check_folds(Path(folder), folds, checkpoint)
    # On a CPU nnU-Net says that it changes a setting nobody made.
    with contextlib.redirect_stdout(io.StringIO()) if not verbose else contextlib.nullcontext():
        predictor = nnUNetPredictor(
            tile_step_size=step_size, use_mirroring=mirroring, perform_everything_on_device=on_device, device=where,
            verbose=verbose, verbose_preprocessing=verbose, allow_tqdm=False,
        )  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), checkpoint)
    return predictor


def network_of(predictor: nnUNetPredictor) -> nn.Module:
    """The network itself, where ``nnUNet_compile`` has wrapped it."""
    return getattr(predictor.network, "_orig_mod", predictor.network)
