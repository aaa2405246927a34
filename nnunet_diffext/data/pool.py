"""The pool of images without labels: where they come from, and a dataset that serves them to nnU-Net's data loader.

The labels of these cases are never read: with other label files, or none, every batch is the same, bit for bit.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffext.data.dataset import dataset_id, unlabeled_folder
from nnunet_diffext.data.splits import SPLITS_FILE, Split

# b2nd: nnU-Net's format; npz, npy: its older one, compressed and unpacked.
ENDINGS = (".b2nd", ".npy", ".npz")


@dataclass(frozen=True)
class UnlabeledPool:
    """Result of :func:`find_unlabeled`.

    Attributes:
        cases: id -> folder of its preprocessed image, sorted by id.
        without_previous_stage: ids that are left out because the previous stage of the cascade has not segmented them.
    """

    cases: dict[str, Path]
    without_previous_stage: tuple[str, ...] = ()


class EveryVoxel:
    """Stands for the list of the coordinates of all voxels, as nnU-Net stores them: ``(0, *voxel)``; takes no memory.

    Args:
        shape: spatial.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(int(s) for s in shape)

    def __len__(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return (0, *(int(i) for i in np.unravel_index(index, self.shape)))


class NoClassLocations(dict):
    """``class_locations`` of an image without labels: no class is located anywhere.

    In a dataset with an ignore label, nnU-Net centres patches without forced foreground on a random annotated voxel,
    which it looks up under a key ``(-1, 0, 1, ...)``. An empty list there makes it warn at every patch. All voxels make
    it crop at random, as it does in a labelled case that is annotated completely.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.every_voxel = EveryVoxel(shape)

    def __missing__(self, key: Any) -> EveryVoxel:
        if isinstance(key, tuple) and key and key[0] == -1:
            return self.every_voxel
        raise KeyError(key)

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return type(self), (self.every_voxel.shape,)


class UnlabeledDataset(nnUNetDatasetBlosc2):
    """Cases from several folders for ``nnUNetDataLoader``, which must not force foreground
    (``oversample_foreground_percent=0``).

    Args:
        cases: id -> folder with ``<id>.b2nd`` (or ``.npy``, ``.npz``).
        folder_with_segs_from_previous_stage: of a cascade; holds a segmentation of every case.

    Raises:
        ValueError: no cases.
    """

    def __init__(
        self, cases: Mapping[str, str | Path], folder_with_segs_from_previous_stage: str | Path | None = None
    ) -> None:
        if not cases:
            raise ValueError("There are no unlabelled cases: an empty dataset cannot be sampled from.")
        previous = folder_with_segs_from_previous_stage
        super().__init__("", list(cases), None if previous is None else str(previous))
        self.folders = {identifier: str(folder) for identifier, folder in cases.items()}

    def load_case(self, identifier: str) -> tuple[Any, np.ndarray, Any, dict[str, Any]]:
        """Image and stand-ins for what comes with a label.

        Returns:
            data: ``(C, *spatial)``, on disk until it is sliced.
            seg: ``(1, *spatial)`` zeros of one byte in all. int8: nnU-Net's cast to int16 copies the patch, and what a
                transform writes into it stays there.
            seg_prev: ``(*spatial)`` segmentation of the previous stage, or None.
            properties: ``class_locations`` only; the stored ones were made with the label.
        """
        data = self._open(Path(self.folders[identifier]), identifier, "data")
        seg = np.broadcast_to(np.zeros((), np.int8), (1, *data.shape[1:]))
        seg_prev = None
        if self.folder_with_segs_from_previous_stage is not None:
            seg_prev = self._open(Path(self.folder_with_segs_from_previous_stage), identifier, "seg")
        return data, seg, seg_prev, {"class_locations": NoClassLocations(data.shape[1:])}

    def _open(self, folder: Path, identifier: str, npz_key: str) -> Any:
        file = stored_file(folder, identifier)
        if file is None:
            raise FileNotFoundError(f"{folder} holds no {identifier} ({', '.join(ENDINGS)}). Was it removed meanwhile?")
        if file.suffix == ".b2nd":
            return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, **self.mmap_kwargs)
        # A .npz holds the segmentation too; members are read one by one, when they are asked for.
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r")
        with np.load(file) as archive:
            return archive[npz_key]


def stored_file(folder: Path, identifier: str) -> Path | None:
    """File of a preprocessed case (or of a segmentation of the previous stage), or None."""
    for ending in ENDINGS:
        file = folder / (identifier + ending)
        if file.is_file():
            return file
    return None


def find_unlabeled(
    preprocessed_dataset_dir: str | Path,
    data_identifier: str,
    split: Split,
    fold: int | str,
    *,
    cascade_folder: str | Path | None = None,
) -> UnlabeledPool:
    """All cases to learn from without labels.

    These are the ``unlabeled`` ids of the split (in the folder of the labelled cases, or in that of the unlabelled
    ones) and everything in ``<data_identifier>_unlabeled``.

    Args:
        preprocessed_dataset_dir: ``<nnUNet_preprocessed>/<dataset>``.
        data_identifier: of the configuration.
        split: of the fold.
        fold: for messages.
        cascade_folder: segmentations of the previous stage; cases that have none are left out and reported.

    Raises:
        FileNotFoundError: an id of the split has no preprocessed image.
        ValueError: a case in the unlabelled folder is a training or validation case of the fold.
    """
    root = Path(preprocessed_dataset_dir)
    labeled_dir, unlabeled_dir = root / data_identifier, unlabeled_folder(root, data_identifier)
    cases = {identifier: unlabeled_dir for identifier in _identifiers(unlabeled_dir)}
    both = sorted(set(cases) & {*split.train, *split.val})
    if both:
        raise ValueError(
            f"{unlabeled_dir} holds {both}, which fold {fold} uses as training or validation cases "
            f"({root / SPLITS_FILE}). Delete their files there, or change the split."
        )
    for identifier in split.unlabeled:
        # Cases of both folders are the same image; the labelled folder is what nnU-Net keeps up to date.
        if stored_file(labeled_dir, identifier) is not None:
            cases[identifier] = labeled_dir
    missing = sorted(set(split.unlabeled) - set(cases))
    if missing:
        number = dataset_id(root.name)
        raise FileNotFoundError(
            f"{root / SPLITS_FILE}, fold {fold}: the unlabelled cases {missing} are neither in {labeled_dir} nor in "
            f"{unlabeled_dir}. Run nnUNetv2_preprocess -d {number} for cases of imagesTr, or nnunet_diffext "
            f"preprocess_unlabeled -d {number} for cases of imagesTu, with the plans and configuration of the training."
        )
    left_out: list[str] = []
    if cascade_folder is not None:
        left_out = sorted(i for i in cases if stored_file(Path(cascade_folder), i) is None)
    return UnlabeledPool({i: cases[i] for i in sorted(cases) if i not in set(left_out)}, tuple(left_out))


def entirely_ignored(folder: str | Path, identifiers: Iterable[str], label_manager: LabelManager) -> list[str]:
    """Which labelled cases carry the ignore label only, and so have nothing to be supervised with.

    nnU-Net's preprocessing stores where annotated voxels are; this reads that, not the labels.

    Args:
        folder: of the preprocessed labelled cases.
        identifiers: cases to look at.
        label_manager: of the dataset.

    Returns:
        Ids in the given order; none if the dataset has no ignore label.

    Raises:
        FileNotFoundError: a case is not preprocessed.
        ValueError: a case was preprocessed before the dataset had an ignore label.
    """
    if not label_manager.has_ignore_label:
        return []
    key = (-1, *(int(label) for label in label_manager.all_labels))
    found = []
    for identifier in identifiers:
        file = Path(folder) / f"{identifier}.pkl"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist. Run nnUNetv2_preprocess again.")
        with open(file, "rb") as handle:
            locations = pickle.load(handle).get("class_locations", {})
        if key not in locations:
            raise ValueError(
                f"{file} does not say which voxels are annotated: it was preprocessed when dataset.json had other "
                "labels. Run nnUNetv2_preprocess again."
            )
        if len(locations[key]) == 0:
            found.append(identifier)
    return found


def _identifiers(folder: Path) -> set[str]:
    """Cases in a folder of preprocessed images, in any of the formats."""
    if not folder.is_dir():
        return set()
    names = (f.name for f in folder.iterdir() if f.suffix in ENDINGS and f.is_file())
    return {n.rpartition(".")[0] for n in names if not n.endswith(("_seg.b2nd", "_seg.npy"))}
