"""Predicting a folder of images: what ``nnunet_diffext predict`` does."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_diffext.data.image_checks import Case, check_case, collect_cases
from nnunet_diffext.files import UNCERTAINTY
from nnunet_diffext.inference.ensemble import Ensemble
from nnunet_diffext.inference.export import Output, to_case_result, write_case
from nnunet_diffext.inference.grid import ModelPlans, preprocess
from nnunet_diffext.inference.images import map_ending
from nnunet_diffext.inference.output_folder import prepare_folder
from nnunet_diffext.inference.pipeline import CaseError, Workers, reason, run_ahead
from nnunet_diffext.inference.predictor import Predictor
from nnunet_diffext.inference.quality import QualityTable, Scores

_ONLY_WARN = ("differ in origin", "differ in direction", "differ in affine", "holds nothing but zeros")
"""Problems of images that nnU-Net predicts all the same."""
_BREAKS = (
    "the sampler {} adds noise on the way, which begins anew in every tile: where an image has several, its samples do "
    "not continue from one to the next, and overlaps average them. Samples of whole images need ddim or dpm++."
)


@dataclass
class Report:
    """What became of the cases of a folder."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For the user."""
        text = [f"{len(self.done)} case(s) predicted" + (f", {len(self.skipped)} skipped" if self.skipped else "")]
        if self.failed:
            text += [f"{len(self.failed)} case(s) FAILED:", *(f"  - {c}: {why}" for c, why in self.failed.items())]
        return text


def find_cases(
    model: ModelPlans, folder: Path, part_id: int = 0, num_parts: int = 1
) -> tuple[list[Case], dict[str, str]]:
    """Cases of this part of a folder, and what is wrong with the names of the others.

    Raises:
        FileNotFoundError: no folder, or no image in it. ValueError: the part does not exist.
    """
    if not 0 <= part_id < num_parts:
        raise ValueError(f"-part_id must be 0 to {num_parts - 1} for -num_parts {num_parts}; got {part_id}.")
    ending = model.file_ending
    if not folder.is_dir():
        raise FileNotFoundError(f"The input folder {folder} does not exist. Check -i.")
    if not any(f.name.endswith(ending) for f in folder.iterdir()):
        raise FileNotFoundError(
            f"{folder} holds no file that ends in {ending}, the file_ending of the dataset. Images must be called "
            f"CASE_0000{ending}, CASE_0001{ending}, ..., one number per channel."
        )
    cases, problems = collect_cases(folder, ending, set())
    wrong = dict(p.split(": ", 1) for p in problems)
    cases = [c for c in cases if c.identifier not in wrong]
    if part_id:  # what is wrong is reported once
        wrong = {}
    return cases[part_id::num_parts], wrong


def predict_folder(
    predictor: Predictor,
    images: str | Path,
    output: Output,
    *,
    previous_stage: str | Path | None = None,
    continue_prediction: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    preprocessing_processes: int = 3,
    export_processes: int = 3,
    show_progress: bool = True,
    verbose: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Report:
    """Predict every case of a folder. One that fails is reported and costs the others nothing.

    Args:
        predictor: the model.
        images: called ``{CASE}_{XXXX}{file_ending}``.
        output: folder and wanted files.
        previous_stage: folder of the segmentations that a cascade needs.
        continue_prediction: skip cases whose files are all there, and keep their scores.
        num_parts: into how many calls the cases are divided.
        part_id: which of them this is.
        preprocessing_processes: 0: in this process.
        export_processes: 0: in this process.
        show_progress: a progress bar over the cases.
        verbose: nnU-Net's own messages.
        arguments: of the call, for ``predict_from_raw_data_args.json``.

    Raises:
        FileNotFoundError, ValueError: the call cannot work for any case; nothing was done.
    """
    model = predictor.model
    cases, wrong = find_cases(model, Path(images), part_id, num_parts)
    previous = _previous_files(model, previous_stage, cases)
    record = {"input": str(images), **dict(arguments or {})}
    every = [case.identifier for case in find_cases(model, Path(images))[0]]
    table = prepare_folder(predictor, output.folder, continue_prediction, record, every)
    report = Report(failed=wrong)
    rows = table.read()
    if continue_prediction:
        names = [c.identifier for c in cases]
        report.skipped = [name for name in names if name in rows and output.is_complete(model, name)]
    todo = [c for c in cases if c.identifier not in set(report.skipped)]
    if not continue_prediction:
        table.forget({name for name in rows if not (output.folder / f"{name}{model.file_ending}").is_file()})
    _say(model, output, predictor, todo, report)
    jobs = [(model, c, previous[c.identifier], verbose) for c in todo]
    with (
        tqdm(total=len(todo), desc="Predicting", unit="case", disable=not show_progress) as bar,
        Workers(preprocessing_processes) as readers,
        Workers(export_processes) as writers,
    ):
        _run(predictor, jobs, output, readers, writers, table, report, bar)
    return report


def _run(
    predictor: Predictor,
    jobs: Sequence[tuple[ModelPlans, Case, str | None, bool]],
    output: Output,
    readers: Workers,
    writers: Workers,
    table: QualityTable,
    report: Report,
    bar: tqdm,
) -> None:
    """Predict one case after the other, while the next ones are read and the last ones are written."""
    writing: deque[tuple[str, Future]] = deque()
    warned = False
    for index, prepared in run_ahead(readers, _prepare_case, jobs):
        case = jobs[index][1].identifier
        bar.set_postfix_str(case)
        try:
            data, properties, notes = prepared.result()
            for note in notes:
                tqdm.write(f"WARNING: {note}")
            if not warned and predictor.sampling.adds_noise and (output.samples or predictor.tiles(data) > 1):
                tqdm.write(f"WARNING: {_BREAKS.format(predictor.sampling.sampler)}")
                warned = True
            ensemble = predictor.predict_preprocessed(data, variance=output.uncertainty, samples=output.samples > 0)
        except Exception as error:  # whatever a reader or a network raises; the other cases go on
            report.failed[case] = reason(error)
            bar.update()
            continue
        table.forget({case})  # of the segmentation that is replaced; with a kill in between, the case is incomplete
        job = (case, ensemble, properties, predictor.model, predictor.temperature, output)
        writing.append((case, writers.submit(_export_case, *job)))
        while len(writing) > (writers.processes + 1 if writers.processes else 0):
            _collect(writing, table, report, bar)
    while writing:
        _collect(writing, table, report, bar)


def _collect(writing: deque[tuple[str, Future]], table: QualityTable, report: Report, bar: tqdm) -> None:
    """Wait for the oldest case to be written."""
    case, future = writing.popleft()
    try:
        table.add(case, future.result())
        report.done.append(case)
    except Exception as error:  # a full disk, an image that cannot be resampled: reported with its case
        report.failed[case] = reason(error)
    bar.update()


def _prepare_case(
    model: ModelPlans, case: Case, previous: str | None, verbose: bool
) -> tuple[np.ndarray, dict[str, Any], list[str]]:
    """In a worker process: checks and preprocessing, and what nnU-Net would only warn about."""
    problems = check_case(case, model.plans.image_reader_writer_class, model.channel_names)
    if previous is not None and not Path(previous).is_file():
        problems.append(f"the segmentation of the previous stage is missing: {previous}")
    warnings = [p for p in problems if any(w in p for w in _ONLY_WARN)]
    errors = [p for p in problems if p not in warnings]
    if errors:
        raise CaseError("; ".join(e.removeprefix(f"{case.identifier}: ") for e in errors))
    return *preprocess(model, case.files, previous, verbose), warnings


def _export_case(
    case: str, ensemble: Ensemble, properties: dict[str, Any], model: ModelPlans, temperature: float, output: Output
) -> Scores:
    """In a worker process."""
    result = to_case_result(model, ensemble, properties, temperature)
    write_case(result, case, model, output)
    return result.quality


def _previous_files(model: ModelPlans, folder: str | Path | None, cases: Sequence[Case]) -> dict[str, str | None]:
    if not model.is_cascade:
        return {c.identifier: None for c in cases}
    stage = model.configuration.previous_stage_name
    if folder is None or not Path(folder).is_dir():
        found = "" if folder is None else f" {folder} does not exist."
        raise ValueError(
            f"This is a cascade.{found} Predict the same images with {stage} first, and name the folder of these "
            "predictions with -prev_stage_predictions."
        )
    return {c.identifier: str(Path(folder) / f"{c.identifier}{model.file_ending}") for c in cases}


def _say(model: ModelPlans, output: Output, predictor: Predictor, todo: Sequence[Case], report: Report) -> None:
    sampling = predictor.sampling
    drawn = f" x {sampling.samples} samples ({sampling.sampler}, {sampling.steps} steps)" if sampling.samples else ""
    print(
        f"{len(todo)} case(s) to predict, {len(report.skipped)} skipped; each is the mean of {predictor.members} "
        f"member(s): {len(predictor.folds)} fold(s) x {len(predictor.mirrors)} mirrored pass(es){drawn}."
    )
    ending = map_ending(model.plans.image_reader_writer_class, model.file_ending)
    if output.uncertainty and ending != model.file_ending:
        print(f"{model.file_ending} cannot hold floats: the maps in {UNCERTAINTY}/ are {ending} files.")
    if output.uncertainty and predictor.members == 1:
        print("There is a single member: mutual information and variance are 0. The entropy is that of the network.")
