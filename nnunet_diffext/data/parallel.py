"""Many independent jobs in worker processes, with a progress bar; one that fails does not stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm


class PreprocessingError(ValueError):
    """Cases that could not be preprocessed; those that are finished are kept."""


@dataclass(frozen=True)
class Failure:
    """An exception as text: not every exception survives the way back from a worker process."""

    message: str
    traceback: str


def run_all(
    function: Callable[..., Any], jobs: list[tuple], num_processes: int, description: str, show_progress: bool
) -> Iterator[tuple[int, Any]]:
    """``function(*job)`` for all jobs with a progress bar: pairs of the job's index and its result, or failure."""
    with tqdm(total=len(jobs), desc=description, disable=not show_progress) as bar:
        for item in _results(function, jobs, min(num_processes, len(jobs))):
            bar.update()
            yield item


def _results(function: Callable[..., Any], jobs: list[tuple], workers: int) -> Iterator[tuple[int, Any]]:
    if workers <= 1:
        for index, job in enumerate(jobs):
            yield index, _outcome(function, job)
        return
    # spawn, as nnU-Net: forked children of a process with threads (torch, blosc2) may hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(_outcome, function, job): index for index, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise PreprocessingError(
            "A worker process died, most likely for lack of memory. Finished cases are kept: run the command again "
            f"with fewer processes than {workers} (-np)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(function: Callable[..., Any], job: tuple) -> Any:
    try:
        return function(*job)
    except Exception as error:  # reported together with those of the other cases
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
