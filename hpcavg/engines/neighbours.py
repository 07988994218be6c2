"""Weighted means of the neighbours on a graph, for gossip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours
from hpcavg.distributed.topology import Topology
from hpcavg.engines.reduction import PIECE_ELEMENTS, Array, Values, as_array, put, sum_dtype

# 1 MiB of float32 per message: large enough for a fast network, and small enough for the memory of all neighbours.
_MESSAGE_ELEMENTS = 256 * 1024
_TAG = 77


def mix(own: Tensor, out: Tensor, topology: Topology, scope: Neighbours, here: Mapping[int, Tensor]) -> None:
    """Write the weighted mean of its neighbours to the row of each learner. Collective over all ranks on the graph.

    The sum is in the order of the learners, whether a row arrives by message or is in shared memory.

    Parameters
    ----------
    own : the rows of this rank's learners, shape (learners, numel), real, in host memory.
    out : the means, shape (learners, numel). It may be `own` if no other rank reads `own` in shared memory.
    topology : the learners.
    scope : the graph.
    here : rows of other ranks in shared memory, by learner. These ranks read `own` in shared memory, too.
    """
    links, comm, numel = topology.links(scope), topology.comm(scope), own.shape[1]
    rows = {**here, **dict(zip(topology.learners, own, strict=True))}
    # Messages between two ranks arrive in the order in which they were sent: that of the learners.
    sources = [(rank, each) for rank, learners in links.sources.items() for each in learners if each not in here]
    reads_here = set(map(topology.rank_of, here))
    targets = [(rank, each) for rank, learners in links.targets.items() if rank not in reads_here for each in learners]
    for first in range(0, numel, _MESSAGE_ELEMENTS):
        part = slice(first, min(first + _MESSAGE_ELEMENTS, numel))
        received = {learner: torch.empty_like(own[0, part]) for _, learner in sources}
        requests = [comm.Irecv(_bytes(received[learner]), rank, _TAG) for rank, learner in sources]
        requests += [comm.Isend(_bytes(rows[learner][part]), rank, _TAG) for rank, learner in targets]
        MPI.Request.Waitall(requests)
        values = {learner: as_array(row[part]) for learner, row in rows.items()}
        values |= {learner: as_array(row) for learner, row in received.items()}
        terms = [[(weight, values[learner]) for learner, weight in row.items()] for row in links.weights]
        _add_weighted(terms, [as_array(row[part]) for row in out])


def _add_weighted(terms: Sequence[Sequence[tuple[float, Array]]], out: Sequence[Array]) -> None:
    """Write weighted sums of rows to `out`, which may be some of the rows.

    Parameters
    ----------
    terms : for each sum, weights and rows.
    out : the sums.
    """
    dtype = sum_dtype(out[0])
    for first in range(0, len(out[0]), PIECE_ELEMENTS):
        piece = slice(first, min(first + PIECE_ELEMENTS, len(out[0])))
        totals = []
        for each in terms:
            total = np.zeros(piece.stop - first, dtype=dtype)
            for weight, row in each:
                total += _values(row[piece]) * dtype.type(weight)
            totals.append(total)
        for total, target in zip(totals, out, strict=True):  # no sum reads the rows any more
            put(total, target[piece])


def _values(row: Array) -> Values:
    return row.float().numpy() if isinstance(row, Tensor) else row


def _bytes(row: Tensor) -> Values:
    """Return the memory of `row` as bytes, for MPI."""
    return row.view(torch.uint8).numpy()
