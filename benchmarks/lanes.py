"""The lane Allreduce: sums in shared memory inside nodes, and one Allreduce in each lane between them.

The decomposition of Träff and Hunold, "Decomposing MPI Collectives for Exploiting Multi-lane Communication" (CLUSTER
2020), with shared memory inside nodes. Shares no code with hpcavg's engines but the sums of rows.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.distributed.shared_memory import map_shared_memory
from hpcavg.engines.reduction import ALIGNMENT_ELEMENTS, PIECE_ELEMENTS, add_up, average, slice_of


class LaneAllreduce:
    """A mean over all learners. Each call replaces the row of every learner.

    There are as many lanes as the smallest node has learners. The ranks with the same index on their nodes form a lane.

    Parameters
    ----------
    topology : Topology
        The learners, one on each rank. The constructor and the calls are collective over them.
    numel : int
        The number of float32 elements of a row.

    Attributes
    ----------
    row : numpy.ndarray
        This learner's row, shape (numel,). It is in shared memory, and zero at first.
    """

    def __init__(self, topology: Topology, numel: int) -> None:
        self._node, learners = topology.peers, topology.learner_ranks
        index, size = self._node.Get_rank(), self._node.Get_size()
        num_lanes = min(learners.allgather(size))
        has_lane = index < num_lanes
        self._lane = topology.own(learners.Split(index if has_lane else MPI.UNDEFINED, learners.Get_rank()))
        stride = -(-numel // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
        memory = map_shared_memory(self._node, 4 * stride * size)
        rows = np.frombuffer(memory, np.float32, stride * size).reshape(size, stride)[:, :numel]
        start, end = slice_of(numel, index, num_lanes) if has_lane else (0, 0)
        self.row, self._slices = rows[index], [row[start:end] for row in rows]
        self._sum = np.empty(end - start, np.float32)
        self._num_learners = topology.num_learners

    def __call__(self) -> None:
        """Replace all rows by their mean."""
        total, slices = self._sum, self._slices
        self._node.Barrier()  # all rows are final
        for first in range(0, total.size, PIECE_ELEMENTS):
            piece = slice(first, first + PIECE_ELEMENTS)
            add_up([part[piece] for part in slices], total[piece])
        if self._lane != MPI.COMM_NULL:
            self._lane.Allreduce(MPI.IN_PLACE, total)
        average([total], slices, 0, total.size, self._num_learners)
        self._node.Barrier()  # the mean is complete
