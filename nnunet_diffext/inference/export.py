"""The result of one case on the grid of its files, and the files it becomes: all of them or none."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_diffext.files import UNCERTAINTY
from nnunet_diffext.inference.ensemble import Ensemble
from nnunet_diffext.inference.grid import ModelPlans, maps_to_original, probabilities_to_original
from nnunet_diffext.inference.images import map_ending, write_map
from nnunet_diffext.inference.quality import Scores, score_prediction, voxel_volume_ml
from nnunet_diffext.inference.temperature import apply_temperature

MAP_NAMES = ("entropy", "mutual_information", "variance")
SAMPLES = "samples"
_SIDE = re.compile(rf"sample\d+|{'|'.join(MAP_NAMES)}")


@dataclass(frozen=True)
class CaseResult:
    """One case in its own geometry, in the axis order of the dataset's reader.

    Attributes:
        segmentation: ``(*)`` uint8 or uint16.
        probabilities: ``(K, *)`` float32, temperature applied.
        maps: ``entropy``, ``mutual_information`` and, if asked for, ``variance``: ``(*)`` float32.
        samples: ``(*)`` segmentations of the single samples.
        quality: see :mod:`~nnunet_diffext.inference.quality`.
        properties: for nnU-Net's writers.
    """

    segmentation: np.ndarray
    probabilities: np.ndarray
    maps: dict[str, np.ndarray]
    samples: list[np.ndarray]
    quality: Scores
    properties: dict[str, Any] = field(repr=False)


def to_case_result(
    model: ModelPlans, ensemble: Ensemble, properties: dict[str, Any], temperature: float = 1.0
) -> CaseResult:
    """From the preprocessed grid to that of the files."""
    segmentation, probabilities = probabilities_to_original(model, ensemble.probabilities, properties)
    probabilities = apply_temperature(probabilities, temperature, model.space.regions)
    named = {"entropy": ensemble.entropy, "mutual_information": ensemble.mutual_information}
    if ensemble.variance is not None:
        named["variance"] = ensemble.variance
    maps = dict(zip(named, maps_to_original(model, np.stack(list(named.values())), properties), strict=True))
    samples = [] if ensemble.samples is None else ensemble.samples
    quality = score_prediction(
        segmentation,
        probabilities,
        maps["entropy"],
        maps["mutual_information"],
        foreground=model.foreground(),
        voxel_ml=voxel_volume_ml(segmentation.shape, properties["spacing"]),
        agreement=ensemble.agreement,
    )
    drawn = [probabilities_to_original(model, p, properties)[0] for p in samples]
    return CaseResult(segmentation, probabilities, maps, drawn, quality, properties)


@dataclass(frozen=True)
class Output:
    """Where results go and which are wanted.

    Attributes:
        folder: of the segmentations.
        probabilities: also ``CASE.npz`` and ``CASE.pkl``, as nnU-Net writes them.
        uncertainty: also ``uncertainty/CASE_entropy``, ``_mutual_information`` and ``_variance``.
        samples: also so many ``samples/CASE_sampleNN``.
    """

    folder: Path
    probabilities: bool = False
    uncertainty: bool = False
    samples: int = 0

    def files(self, model: ModelPlans, case: str) -> Iterator[Path]:
        """Every file of a case, relative to the folder; the segmentation last."""
        if self.probabilities:
            yield from (Path(f"{case}.npz"), Path(f"{case}.pkl"))
        if self.uncertainty:
            ending = map_ending(model.plans.image_reader_writer_class, model.file_ending)
            for name in MAP_NAMES:
                yield Path(UNCERTAINTY) / f"{case}_{name}{ending}"
        for m in range(self.samples):
            yield Path(SAMPLES) / f"{case}_sample{m:02d}{model.file_ending}"
        yield Path(f"{case}{model.file_ending}")

    def is_complete(self, model: ModelPlans, case: str) -> bool:
        """Whether every file of a case is there."""
        return all((self.folder / file).is_file() for file in self.files(model, case))

    def remove_stale(self, model: ModelPlans, case: str) -> None:
        """Delete what an earlier prediction of the case left and this one does not write: it would be taken for a part
        of this one."""
        prefix = f"{case}_"
        kept = {_kind(file, prefix) for file in self.files(model, case)}
        for folder in (self.folder / UNCERTAINTY, self.folder / SAMPLES):
            for file in folder.glob("*") if folder.is_dir() else ():
                if _SIDE.fullmatch(_kind(file, prefix)) and _kind(file, prefix) not in kept:
                    file.unlink()
        if not self.probabilities:
            for ending in (".npz", ".pkl"):
                (self.folder / f"{case}{ending}").unlink(missing_ok=True)

    def staging(self, case: str) -> Path:
        """Where the files of a case are written before they appear together."""
        return self.folder / f".incomplete_{case}"


def write_case(result: CaseResult, case: str, model: ModelPlans, output: Output) -> None:
    """Write into a folder of its own first, then rename: a kill at any moment leaves whole files only, and the
    segmentation appears last. No file of an earlier prediction of the case stays."""
    staging = output.staging(case)
    shutil.rmtree(staging, ignore_errors=True)  # of a killed run
    reader = model.plans.image_reader_writer_class
    writer = reader()
    samples = iter(result.samples)
    try:
        for file in output.files(model, case):
            target = staging / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".npz":
                np.savez_compressed(target, probabilities=result.probabilities)
            elif file.suffix == ".pkl":
                target.write_bytes(pickle.dumps(result.properties))
            elif file.parent.name == UNCERTAINTY:
                write_map(result.maps[_kind(file, f"{case}_")], target, reader, result.properties)
            else:
                array = next(samples) if file.parent.name == SAMPLES else result.segmentation
                writer.write_seg(array, str(target), result.properties)
        output.remove_stale(model, case)
        _move(staging, output.folder, last=Path(f"{case}{model.file_ending}"))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _kind(file: Path, prefix: str) -> str:
    """``entropy`` or ``sample03``, where the name begins with the case's prefix."""
    return file.name[len(prefix) :].split(".")[0] if file.name.startswith(prefix) else ""


def _move(source: Path, target: Path, last: Path) -> None:
    """Move all files, side files of the writers included."""
    files = sorted((f.relative_to(source) for f in source.rglob("*") if f.is_file()), key=lambda f: f == last)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
