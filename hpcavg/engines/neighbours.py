"""Weighted means of the neighbours on a graph, for gossip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.distributed.topology import Links
from hpcavg.engines.reduction import PIECE_ELEMENTS, Array, Values, as_array, put, sum_dtype

# 1 MiB of float32 per message: large enough for a fast network, and small enough for the memory of all neighbours.
_MESSAGE_ELEMENTS = 256 * 1024
_TAG = 77


def mix(own: Tensor, out: Tensor, links: Links, here: Mapping[int, Tensor], comm: MPI.Comm) -> None:
    """Write the weighted mean of this rank's neighbours to `out`. Collective over all ranks on the graph.

    The sum is in the order of the ranks, whether a row arrives by message or is in shared memory.

    Parameters
    ----------
    own : this rank's row, shape (numel,), in host memory.
    out : the mean, shape (numel,). It may be `own` if no other rank reads `own` in shared memory.
    links : the edges of this rank.
    here : rows in shared memory, by rank. These ranks read `own` in shared memory, too.
    comm : communicator for messages with the other ranks.
    """
    rank = comm.Get_rank()
    rows = {**here, rank: own}
    sources = [source for source in links.sources if source not in here]
    targets = [target for target in links.targets if target not in here]
    for first in range(0, own.numel(), _MESSAGE_ELEMENTS):
        part = slice(first, min(first + _MESSAGE_ELEMENTS, own.numel()))
        received = {source: torch.empty_like(own[part]) for source in sources}
        requests = [comm.Irecv(_bytes(received[source]), source, _TAG) for source in sources]
        requests += [comm.Isend(_bytes(own[part]), target, _TAG) for target in targets]
        MPI.Request.Waitall(requests)
        terms = [
            (weight, as_array(received[source] if source in received else rows[source][part]))
            for source, weight in links.weights.items()
        ]
        _add_weighted(terms, as_array(out[part]))


def _add_weighted(terms: Sequence[tuple[float, Array]], out: Array) -> None:
    """Write the weighted sum of all rows to `out`, which may be one of the rows. `terms` has weights and rows."""
    dtype = sum_dtype(out)
    for first in range(0, len(out), PIECE_ELEMENTS):
        piece = slice(first, min(first + PIECE_ELEMENTS, len(out)))
        total = np.zeros(piece.stop - first, dtype=dtype)
        for weight, row in terms:
            total += _values(row[piece]) * dtype.type(weight)
        put(total, out[piece])


def _values(row: Array) -> Values:
    return row.float().numpy() if isinstance(row, Tensor) else row


def _bytes(row: Tensor) -> Values:
    """Return the memory of `row` as bytes, for MPI."""
    return row.view(torch.uint8).numpy()
