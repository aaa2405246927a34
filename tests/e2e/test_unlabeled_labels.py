"""The labels of unlabelled cases are never read: other files, or none, give the same training, bit for bit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from workspace import MAIN, Workspace, make_trainer, train

UNLABELED = ("case_002", "case_003")
NAME = "DMEDSegTrainer_1epochs_2iters_1valiters_seed5"


def two_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, np.ndarray]], list[torch.Tensor]]:
    """Losses and weights of two steps on nnU-Net's own batches, loaded in this process from a fixed seed."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(MAIN, NAME)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    losses = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    return losses, [p.detach().clone() for p in trainer.network.parameters()]


def same(one: tuple, other: tuple) -> bool:
    """Bit for bit."""
    losses = all(np.array_equal(a[k], b[k]) for a, b in zip(one[0], other[0], strict=True) for k in a)
    return losses and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def scramble(preprocessed: Path, raw: Path, case: str) -> None:
    """Replace every label of a case by noise: raw, preprocessed, and the list of where its classes are."""
    folder = preprocessed / "nnUNetPlans_3d_fullres"
    file = folder / f"{case}_seg.b2nd"
    shape = blosc2.open(urlpath=str(file), mode="r").shape
    noise = np.random.default_rng(0).integers(0, 2, shape).astype(np.int8)
    file.unlink()
    blosc2.asarray(noise, urlpath=str(file))
    with open(folder / f"{case}.pkl", "rb") as handle:
        properties = pickle.load(handle)
    assert len(properties["class_locations"][1])
    properties["class_locations"][1] = properties["class_locations"][1][:1] * 0
    (folder / f"{case}.pkl").write_bytes(pickle.dumps(properties))
    for label in (preprocessed / "gt_segmentations" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"):
        label.write_bytes(b"not an image")


def delete(preprocessed: Path, raw: Path, case: str) -> None:
    """Remove every label file of a case."""
    (preprocessed / "nnUNetPlans_3d_fullres" / f"{case}_seg.b2nd").unlink()
    for label in (preprocessed / "gt_segmentations" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz"):
        label.unlink()


def test_other_labels_or_none_change_nothing(own_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = own_workspace.preprocessed(MAIN), own_workspace.raw(MAIN)
    reference = two_steps(monkeypatch)
    assert same(two_steps(monkeypatch), reference), "two equal runs differ, so the test shows nothing"
    change: Callable[[Path, Path, str], None]
    for change in (scramble, delete):
        for case in UNLABELED:
            change(*folders, case)
        assert same(two_steps(monkeypatch), reference), change.__name__
    train(MAIN, NAME)  # with worker processes and the final validation
    # the same change to a labelled case is noticed
    scramble(*folders, "case_000")
    assert not same(two_steps(monkeypatch), reference)
