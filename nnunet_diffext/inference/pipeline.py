"""Preparing, predicting and writing many cases: preprocessing runs ahead and writing behind, in other processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any

DIED = "a worker process died, most likely for lack of memory: use fewer of them (-npp, -nps), or 0"


class CaseError(ValueError):
    """What is wrong with one case; the others go on."""


def reason(error: BaseException) -> str:
    """An exception as one line for the user."""
    if isinstance(error, BrokenProcessPool):
        return DIED
    text = " ".join(str(error).split()) or "no further information"
    return text if isinstance(error, CaseError) else f"{type(error).__name__}: {text}"


class Workers:
    """So many processes, started as nnU-Net starts its own; 0: everything runs at once, in this process.

    After a process has died, a new pool takes over: only the jobs that were in the old one are lost.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """The future of ``function(*arguments)``; its exception is in it."""
        if not self.processes:
            return _finished(function, *arguments)
        for _ in range(2):
            # spawn: forked children of a process with threads (torch, blosc2) may hang
            self._pool = self._pool or ProcessPoolExecutor(self.processes, mp_context=get_context("spawn"))
            try:
                return self._pool.submit(function, *arguments)
            except BrokenProcessPool:
                self._pool = None
        raise RuntimeError(DIED)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)


def run_ahead(
    workers: Workers, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Future]]:
    """Index and finished future of every job, in order; at most one job more than there are processes is prepared."""
    waiting: deque[tuple[int, Future]] = deque()
    for index, job in enumerate(jobs):
        waiting.append((index, workers.submit(function, *job)))
        if len(waiting) > workers.processes:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _finished(function: Callable[..., Any], *arguments: Any) -> Future:
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # one bad case must not end the batch
        future.set_exception(error)
    return future
