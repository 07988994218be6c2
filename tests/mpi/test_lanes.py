"""The lane Allreduce of the benchmarks: the same mean on any nodes."""

import numpy as np
import pytest

from benchmarks.lanes import LaneAllreduce
from tests.mpi.nodes import TRIED, Nodes, shared_files

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("layout", TRIED)
def test_a_lane_allreduce_takes_the_mean_of_all_rows(world, layout):
    """Rank r has r + (0, 1, 2, ...), of which sums are exact; the mean of r is (P - 1)/2. 66001 are several pieces."""
    nodes = Nodes(world, 1, layout)
    for numel in (1, 7, 1009, 66_001):
        mean = LaneAllreduce(nodes, numel)
        for times in (1, 2):  # a second mean sums what is new in the rows
            mean.row[:] = times * (nodes.rank + np.arange(numel))
            mean()
            expected = times * ((nodes.num_learners - 1) / 2 + np.arange(numel))
            np.testing.assert_allclose(mean.row, expected, rtol=1e-6)
    assert shared_files(world) == []
    nodes.free()
