"""Means inside a node on its GPUs: ranks read each other's device memory, by CUDA IPC.

Every rank averages one slice of all rows on its own device, and then copies the slices of the others. The traffic of
every GPU is twice the size of the parameters, for any number of ranks. There are no messages, but two barriers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, PendingMean
from hpcavg.engines.gpu.cuda import Cuda, Mark
from hpcavg.engines.pending import CountWell
from hpcavg.engines.staged import key_of
from hpcavg.errors import InputError

# Slices start on multiples of this number of elements, for vector loads.
_ALIGNMENT_ELEMENTS = 64
# Half precision is summed in float32, in pieces of 16 MiB.
_PIECE_ELEMENTS = 4 * 2**20


@dataclass
class _Placed:
    """One array of every rank of the node.

    Attributes
    ----------
    rows : the array of every rank, shape (learners, numel).
    slices : the averaged slice of every rank, by scope. Each scope has its own slices: a local group must not overwrite
        slices of a global mean that other ranks still copy.
    fetched : end of the last copy of slices.
    """

    rows: list[Tensor]
    slices: dict[Scope, list[Tensor]]
    fetched: Mark | None = None


class CudaIpcEngine:
    """Means over learners on one node, in each other's device memory.

    Ranks may share a GPU, or have one each with peer access between them. This costs device memory for a local and a
    global slice of the parameters.

    Parameters
    ----------
    topology : the ranks.
    otherwise : the engine for arrays that are not from `allocate`, delayed means, and means of neighbours.
    cuda : the calls to CUDA; None for the real ones.

    Raises
    ------
    InputError
        On every rank, if there are several nodes or, in `allocate`, if memory cannot be shared.
    """

    name = "cuda-ipc"
    compresses = True

    def __init__(self, topology: Topology, otherwise: Engine, cuda: Cuda | None = None) -> None:
        if topology.num_nodes > 1:
            raise InputError("engine", self.name, f"staged or auto: the ranks are on {topology.num_nodes} nodes")
        self._topology = topology
        self._otherwise = otherwise
        self.notes = otherwise.notes
        self._cuda = cuda or Cuda()
        # The indices of the ranks of a scope among the ranks of the node.
        self._members = {scope: topology.comm(scope).allgather(topology.peers.Get_rank()) for scope in (LOCAL, GLOBAL)}
        self._placed: dict[object, _Placed] = {}

    def allocate(self, array: Tensor) -> Tensor:
        """Return `array`. The other ranks of the node open its memory."""
        if not self._cuda.holds(array) or array.numel() == 0 or self._topology.peers.Get_size() == 1:
            return self._otherwise.allocate(array)
        own = {
            scope: torch.empty(_slice_elements(array.shape[1], len(members)), dtype=array.dtype, device=array.device)
            for scope, members in self._members.items()
        }
        try:
            rows = share(self._topology.peers, array, self._cuda)
            slices = {scope: share(self._topology.peers, own_slice, self._cuda) for scope, own_slice in own.items()}
        except OSError as error:
            raise InputError("engine", self.name, f"staged or auto: {error}") from error
        self._placed[key_of(array)] = _Placed(rows, slices)
        return array

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine`."""
        placed = self._placed.get(key_of(rows))
        members = self._members[scope]
        if placed is None or len(members) == 1:
            self._otherwise.mean(rows, out, scope, num_well, exact)
            return
        comm, cuda, device = self._topology.comm(scope), self._cuda, rows.device
        bounds = _bounds(rows.shape[1], len(members))
        start, end = bounds[comm.Get_rank()]
        if placed.fetched is not None:
            placed.fetched.synchronize()  # the copy may be in another stream
        cuda.synchronize(device)
        comm.Barrier()  # all rows are final, and no rank reads the slices of the last mean any more
        slices = placed.slices[scope]
        own_slice = slices[self._topology.peers.Get_rank()]
        num_ranks = len(members) if num_well is None else num_well
        count = num_ranks * rows.shape[0]
        _average([placed.rows[peer][:, start:end] for peer in members], own_slice[: end - start], count)
        cuda.synchronize(device)
        comm.Barrier()  # all slices are complete, and no rank reads rows any more
        for peer, (start, end) in zip(members, bounds, strict=True):
            cuda.copy(out[start:end], slices[peer][: end - start])
        placed.fetched = cuda.mark(device)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of the neighbours to this rank's row, by `otherwise`."""
        self._otherwise.mix(rows, out, scope)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> PendingMean:
        """Start the means of `arrays` over the learners in `scope`, by `otherwise`."""
        return self._otherwise.start(arrays, scope, count_well)


def find_obstacle(topology: Topology, device: torch.device, cuda: Cuda | None = None) -> str | None:
    """Return why ranks cannot read each other's device memory; None if they can. Collective over all ranks.

    Parameters
    ----------
    topology : the ranks.
    device : this rank's device.
    cuda : the calls to CUDA; None for the real ones.
    """
    cuda = cuda or Cuda()
    obstacle = None
    if topology.num_nodes > 1:
        obstacle = f"the ranks are on {topology.num_nodes} nodes"
    else:
        peers = topology.peers
        own = torch.full((1,), float(peers.Get_rank()), device=device)
        cuda.synchronize(device)
        try:
            values = [float(value) for value in share(peers, own, cuda)]
            if values != list(range(peers.Get_size())):
                obstacle = f"CUDA IPC reads {values} where ranks 0 to {peers.Get_size() - 1} wrote their numbers"
        except (RuntimeError, OSError) as error:  # one rank may fail to read memory that it has opened
            obstacle = str(error).partition("\n")[0]
        peers.Barrier()  # no rank frees its memory before all have read it
    return next((found for found in topology.all_ranks.allgather(obstacle) if found is not None), None)


def share(comm: MPI.Comm, array: Tensor, cuda: Cuda) -> list[Tensor]:
    """Return the `array` of every rank of `comm`, in that rank's memory. Collective over `comm`.

    Raises
    ------
    OSError
        On every rank, if memory cannot be shared.
    """
    exported = arrays = None
    error = None
    try:
        exported = cuda.export(array)
    except (RuntimeError, OSError) as raised:
        error = raised
    exports = _gather(comm, exported, error)
    try:
        own = comm.Get_rank()
        arrays = [array if rank == own else cuda.open(exports[rank], array.device) for rank in range(len(exports))]
    except (RuntimeError, OSError) as raised:
        error = raised
    _gather(comm, None, error)
    assert arrays is not None
    return arrays


def _gather(comm: MPI.Comm, value: object, error: Exception | None) -> list[object]:
    """Return the `value` of every rank. Raise `OSError` on all ranks if one has an error."""
    answers = comm.allgather((value, None if error is None else str(error).partition("\n")[0]))
    for rank, (_, message) in enumerate(answers):
        if message is not None:
            raise OSError(f"CUDA IPC does not work on rank {rank} of the node ({message})")
    return [value for value, _ in answers]


def _num_units(numel: int) -> int:
    return -(-numel // _ALIGNMENT_ELEMENTS)


def _slice_elements(numel: int, count: int) -> int:
    """Return the size of the largest of `count` slices, in elements. A single rank does not use its slice."""
    return (_num_units(numel) // count + 1) * _ALIGNMENT_ELEMENTS if count > 1 else 1


def _bounds(numel: int, count: int) -> list[tuple[int, int]]:
    """Return start and end of each of `count` slices of `numel` elements. Slices may be empty."""
    starts = [min(_num_units(numel) * index // count * _ALIGNMENT_ELEMENTS, numel) for index in range(count + 1)]
    return list(itertools.pairwise(starts))


def _average(blocks: list[Tensor], out: Tensor, count: int) -> None:
    """Write the sum of all rows, divided by `count`, to `out`. Blocks have shape (learners, numel)."""
    learners = [row for block in blocks for row in block]
    is_half = out.dtype in (torch.float16, torch.bfloat16)
    for start in range(0, out.numel(), _PIECE_ELEMENTS):
        piece = slice(start, min(start + _PIECE_ELEMENTS, out.numel()))
        total = torch.empty_like(out[piece], dtype=torch.float32) if is_half else out[piece]
        total.copy_(learners[0][piece])
        for row in learners[1:]:
            total.add_(row[piece])
        total.div_(count)
        if is_half:
            out[piece].copy_(total)
