"""The largest patch that fits into memory with two samples, then the largest batch: the order of nnU-Net's planners."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nnunet_diffext.planners.memory import StepMemory
from nnunet_diffext.planners.topology import Topology

MIN_BATCH = 2


class Sizes(NamedTuple):
    """A patch and a batch, and what they need."""

    topology: Topology
    batch_size: int
    memory: StepMemory


class Known(NamedTuple):
    """Memory of a step on ``voxels`` voxels (patch times batch), from which other sizes are guessed."""

    memory: StepMemory
    voxels: int


def largest_sizes(
    candidates: Sequence[Topology],
    needed: Callable[[Topology, int], StepMemory],
    target: float,
    max_batch: Callable[[Topology], int],
    known: Known,
) -> Sizes | None:
    """The largest sizes that fit.

    Args:
        candidates: from the largest patch to the smallest.
        needed: memory of a step.
        target: in bytes.
        max_batch: limit of the batch for a patch.
        known: any size whose need is known; it only saves trials.

    Returns:
        ``None`` if not even the last candidate fits.
    """

    def with_min_batch(i: int) -> StepMemory:
        return needed(candidates[i], MIN_BATCH)

    found = first_that_fits([MIN_BATCH * t.voxels for t in candidates], with_min_batch, target, known)
    if found is None:
        return None
    index, memory = found
    topology = candidates[index]
    batches = range(max_batch(topology), MIN_BATCH, -1)

    def with_batch(i: int) -> StepMemory:
        return needed(topology, batches[i])

    known = Known(memory, MIN_BATCH * topology.voxels)
    more = first_that_fits([b * topology.voxels for b in batches], with_batch, target, known)
    if more is None:
        return Sizes(topology, MIN_BATCH, memory)
    return Sizes(topology, batches[more[0]], more[1])


def first_that_fits(
    sizes: Sequence[int], needed: Callable[[int], StepMemory], target: float, known: Known
) -> tuple[int, StepMemory] | None:
    """Index and memory of the first size that fits, given that all after it fit as well.

    A bisection whose next trial is guessed from the latest one, in proportion to the size: a few trials as a rule.

    Args:
        sizes: in voxels, decreasing.
        needed: memory of the size with this index.
        target: in bytes.
        known: where the first guess comes from.
    """
    low, high = 0, len(sizes)  # what lies before low does not fit; high and what lies after it does
    best: StepMemory | None = None
    while low < high:
        fitting = (i for i, size in enumerate(sizes) if known.memory.scaled(size / known.voxels).total <= target)
        trial = min(max(next(fitting, high), low), high - 1)
        known = Known(needed(trial), sizes[trial])
        if known.memory.total <= target:
            high, best = trial, known.memory
        else:
            low = trial + 1
    return None if best is None else (high, best)
