"""Device arrays by NCCL, through process groups of torch.distributed.

The groups are this engine's own. The default process group, which may be the user's, is neither used nor set.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, distributed

from hpcavg.algorithms.scope import Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.gpu.allreduce import AllreduceEngine, Sum
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.inside import as_real, divide, sum_rows
from hpcavg.engines.pending import CountWell, SteppedMean, Work

_GROUPS = {"nccl": "ProcessGroupNCCL", "gloo": "ProcessGroupGloo"}
# Learners may be apart by any time. The watchdog reports hung ranks.
_TIMEOUT = timedelta(days=30)


class NcclEngine(AllreduceEngine):
    """Means by sums of NCCL, in place in device memory. Half precision is summed in float32.

    Every scope has a process group, and another one for delayed means, which must not wait for blocking ones. A group
    is made at its first mean. NCCL sums in a stream of its own: a delayed mean is a sum that nobody waits for yet.

    Parameters
    ----------
    topology : the ranks. Each has a GPU of its own.
    device : the device of sums. Arrays on other devices are copied to it and back.
    backend : ``"nccl"``; tests without a GPU take ``"gloo"``.
    """

    name = "nccl"

    def __init__(self, topology: Topology, device: torch.device, backend: str = "nccl") -> None:
        super().__init__(topology)
        self._device = device
        self._backend = backend
        self._groups: dict[tuple[Scope, bool], Any] = {}
        topology.on_free(self._close)

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine`.

        Wait for it on the host, too: a rank that waits for others is then known to wait, and for how long.
        """
        self._mean_by(self._sum_over, rows, out, scope, num_well)
        self._cuda.synchronize(self._device)

    def _sum_over(self, scope: Scope) -> Sum:
        group = self._group(scope)

        def sum_up(total: Tensor) -> None:
            there = total.to(self._device)
            with self._cuda.on(self._device):
                group.allreduce(there).wait()
            if there is not total:
                total.copy_(there)

        return sum_up

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> SteppedMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`."""
        group = self._group(scope, in_background=True)
        copies = [sum_rows(rows.unbind()).to(self._device) for rows in arrays]
        with self._cuda.on(self._device):
            sums = [group.allreduce(as_real(copy)) for copy in copies if copy.numel()]

        def collect() -> list[Tensor]:
            for each in sums:
                each.wait()
            num_well, means = None, []
            for rows, copy in zip(arrays, copies, strict=True):
                divide(as_real(copy), num_well or group.size() * len(rows))
                means.append(copy.to(rows.device, rows.dtype))
                if len(means) == 1 and count_well is not None:
                    num_well = count_well(means[0])
            return means

        return SteppedMean(_all_done(sums), collect)

    # -- process groups -------------------------------------------------------------------------------------------

    def _group(self, scope: Scope, in_background: bool = False) -> Any:
        """Return a process group of `scope`. Collective over the scope at the first call."""
        key = (scope, in_background)
        if key not in self._groups:
            is_alone = self._topology.num_nodes == 1
            host = "127.0.0.1" if is_alone else socket.gethostname()
            self._groups[key] = _connect(self._backend, self._topology.comm(scope), host)
        return self._groups[key]

    def _close(self) -> None:
        """End all groups. Collective over all learners."""
        for group in self._groups.values():
            group.shutdown()
        self._topology.learner_ranks.Barrier()  # the others may read the stores of this rank until here
        self._groups.clear()


def _connect(backend: str, comm: MPI.Comm, host: str) -> Any:
    """Return a new process group of the ranks of `comm`. Collective over `comm`.

    Parameters
    ----------
    backend : the library that communicates.
    comm : the ranks.
    host : this rank's node, as the other ranks name it. The ranks meet at a port of the first one's.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    host, port = comm.bcast((host, store.port if store else None))
    if store is None:
        store = distributed.TCPStore(host, port, is_master=False)
    return getattr(distributed, _GROUPS[backend])(store, rank, size, _TIMEOUT)


def _all_done(sums: Sequence[Any]) -> Work:
    """Wait for all of `sums`, in steps."""
    while not all(each.is_completed() for each in sums):
        yield False


def find_obstacle(topology: Topology, device: torch.device, cuda: Cuda | None = None) -> str | None:
    """Return why ranks cannot average with NCCL; None if they can. Collective over all ranks.

    Parameters
    ----------
    topology : the ranks.
    device : this rank's device.
    cuda : the calls to CUDA; None for the real ones.
    """
    obstacle = None if distributed.is_available() and distributed.is_nccl_available() else "this torch has no NCCL"
    users: dict[str, int] = {}
    gpus = topology.peers.allgather((cuda or Cuda()).identity(device))
    for rank, gpu in zip(topology.peer_ranks, gpus, strict=True):
        first = users.setdefault(gpu, rank)
        if first != rank:
            obstacle = obstacle or f"ranks {first} and {rank} share a GPU, which NCCL refuses"
    return next((found for found in topology.all_ranks.allgather(obstacle) if found is not None), None)
