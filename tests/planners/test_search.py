"""The search for the largest sizes, against trying everything."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_diffext.planners.memory import GIB, StepMemory, workspace_for
from nnunet_diffext.planners.search import MIN_BATCH, Known, largest_sizes
from nnunet_diffext.planners.topology import Topology, topologies

FIXED = GIB
CANDIDATES = list(topologies((1.0, 1.0, 1.0), (60, 100, 128)))


class Model:
    """A memory that is roughly, not exactly, in proportion to the size. Remembers what it was asked."""

    def __init__(self, bytes_per_voxel: float, offset: int) -> None:
        self.bytes_per_voxel, self.offset = bytes_per_voxel, offset
        self.trials: list[tuple[Topology, int]] = []

    def total(self, topology: Topology, batch_size: int) -> StepMemory:
        deeper = 1 + 0.02 * len(topology.strides)
        variable = int(self.offset + self.bytes_per_voxel * topology.voxels * batch_size * deeper)
        return StepMemory(FIXED, variable, workspace_for(variable))

    def needed(self, topology: Topology, batch_size: int) -> StepMemory:
        self.trials.append((topology, batch_size))
        return self.total(topology, batch_size)


@pytest.mark.parametrize("seed", range(20))
def test_finds_what_trying_everything_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = Model(10 ** rng.uniform(2, 4.5), int(rng.uniform(0, 5e8)))
    target, limit = rng.uniform(1.2, 40) * GIB, int(rng.integers(1, 60))
    start = CANDIDATES[int(rng.integers(len(CANDIDATES)))]
    known = Known(model.total(start, 2), 2 * start.voxels)
    found = largest_sizes(CANDIDATES, model.needed, target, lambda topology: limit, known)

    fitting = [t for t in CANDIDATES if model.total(t, MIN_BATCH).total <= target]
    if not fitting:
        assert found is None
        return
    batches = [b for b in range(MIN_BATCH, max(limit, MIN_BATCH) + 1) if model.total(fitting[0], b).total <= target]
    assert (found.topology, found.batch_size) == (fitting[0], batches[-1])
    assert found.memory == model.total(found.topology, found.batch_size)
    assert len(model.trials) <= 12, "a trial takes seconds"


def test_nothing_fits() -> None:
    model = Model(1e6, 0)
    known = Known(model.total(CANDIDATES[0], 2), 2 * CANDIDATES[0].voxels)
    assert largest_sizes(CANDIDATES, model.needed, 1.1 * FIXED, lambda topology: 10, known) is None
