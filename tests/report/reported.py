"""Model folders with predictions, without planning or training, and a reader of the page."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from synthetic import make_raw_dataset, write_image

LABELS = {"background": 0, "ball": 1, "core": 2}
CASES = [f"case_{index:03d}" for index in range(4)]
LOGGING = {
    "mean_fg_dice": [np.float32(0.5), np.float32(0.75)],
    "ema_fg_dice": [np.float32(0.5), np.float32(0.525)],
    "dice_per_class_or_region": [[0.5, 0.5], [0.75, 0.75]],
    "train_losses": [0.5, -0.25],
    "val_losses": [0.25, -0.125],
    "lrs": [0.01, 0.005],
    "epoch_start_timestamps": [0.0, 100.0],
    "epoch_end_timestamps": [90.0, 180.0],
    "train_cac": [float("nan"), 0.125],
    "train_silent": [0.0, 0.0],
}


def plans(dataset: str, reader: str, patch: list[int]) -> dict[str, Any]:
    """As little as nnU-Net's own handlers need."""
    configuration: dict[str, Any] = {"patch_size": patch, "batch_size": 2, "spacing": [1.5] * len(patch)}
    configuration["architecture"] = {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []}
    return {
        "dataset_name": dataset, "plans_name": "nnUNetPlans", "image_reader_writer": reader,
        "label_manager": "LabelManager", "configurations": {"2d" if len(patch) == 2 else "3d_fullres": configuration},
    }  # fmt: skip


@dataclass
class Studio:
    """nnU-Net's folders with one dataset in them."""

    raw: Path
    preprocessed: Path
    results: Path
    spacing: tuple[float, ...] = (3.0, 1.0, 0.5)
    dataset: Path = field(init=False)

    def __post_init__(self) -> None:
        self.dataset = make_raw_dataset(
            self.raw, 881, "Report", cases=4, shape=(10, 16, 20), spacing=self.spacing, labels=LABELS, channels=2
        )
        target = self.preprocessed / self.dataset.name
        shutil.copytree(self.dataset / "labelsTr", target / "gt_segmentations")
        splits = [{"train": CASES[2:], "val": CASES[:2]}, {"train": CASES[:2], "val": CASES[2:]}]
        (target / "splits_final.json").write_text(json.dumps(splits))

    @property
    def gt(self) -> Path:
        return self.preprocessed / self.dataset.name / "gt_segmentations"

    def model(
        self, trainer: str = "nnUNetTrainer", folds: int = 2, npz: bool = False, shift: int = 1, curves: bool = False
    ) -> Path:
        """A model folder whose folds predicted their validation cases, ``shift`` voxels beside the truth."""
        folder = self.results / self.dataset.name / f"{trainer}__nnUNetPlans__3d_fullres"
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans(self.dataset.name, "SimpleITKIO", [8, 16, 16])))
        shutil.copy(self.dataset / "dataset.json", folder)
        for fold in range(folds):
            place = folder / f"fold_{fold}"
            self.predict(place / "validation", CASES[2 * fold : 2 * fold + 2], npz, shift)
            self.checkpoint(place, trainer, curves)
            (place / "debug.json").write_text(json.dumps({"torch_version": "9.8.7", "device": "cpu"}))
            (place / "training_log_1.txt").write_text(
                "2026-01-02 03:04:05.1: This split has 2 training and 2 validation cases. \n2026-01-02 04:00:00.0: \n"
            )
        return folder

    def checkpoint(self, place: Path, trainer: str, curves: bool) -> None:
        content: dict[str, Any] = {"trainer_name": trainer, "init_args": {"configuration": "3d_fullres"}}
        content["logging"] = LOGGING if curves else {}
        torch.save(content, place / "checkpoint_final.pth")

    def predict(self, folder: Path, cases: list[str], npz: bool = False, shift: int = 1) -> Path:
        """Predictions that are the truth, moved along the last axis."""
        folder.mkdir(parents=True)
        for case in cases:
            truth = sitk.GetArrayFromImage(sitk.ReadImage(str(self.gt / f"{case}.nii.gz")))
            moved = np.roll(truth, shift, axis=-1)
            write_image(folder / f"{case}.nii.gz", moved, self.spacing)
            if npz:
                p = np.full((3, *moved.shape), 0.1, np.float32)
                np.put_along_axis(p, moved[None].astype(np.intp), 0.8, axis=0)
                np.savez_compressed(folder / f"{case}.npz", probabilities=p)
        return folder


VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.code if self.open and self.open[-1] in ("style", "script") else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
