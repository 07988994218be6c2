"""WHO: the world of learners, their local groups, and the communicators between them.

Importing this module starts MPI (mpi4py does).
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from mpi4py import MPI

from hpcavg.errors import InputError, require_integer
from hpcavg.schedule import Scope

_T = TypeVar("_T")


class Topology:
    """The learners of a run and the communicators between them. One rank is one learner.

    Parameters
    ----------
    comm : the communicator of all learners, ``MPI.COMM_WORLD`` when None. It is duplicated; the original stays free
        for the caller.
    group_size : None makes a local group of the ranks that share a node; S makes groups of S consecutive ranks. S need
        not divide the number of ranks: the last group is then smaller.

    Attributes
    ----------
    world, local, cross, node : all learners; this learner's group; the learners with the same rank in each group; the
        ranks on this node. `cross` joins the groups: one communicator for every local rank.
    rank, num_learners : this learner's index and their number.
    group, num_groups : index of the local group and number of groups.
    group_sizes : the number of learners in each group, by the group's lowest rank.
    num_nodes, node_rank : number of nodes, and this rank's index on its own.

    Raises `InputError` on every rank when `group_size` is not within 1..P.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, group_size: int | None = None) -> None:
        install_abort_hook()
        comm = MPI.COMM_WORLD if comm is None else comm
        if group_size is not None:
            require_integer("group_size", group_size, 1, comm.Get_size())
        self.world = comm.Dup()
        self.rank: int = self.world.Get_rank()
        self.num_learners: int = self.world.Get_size()
        self.node = self.world.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self.node_rank: int = self.node.Get_rank()
        # The lowest rank of a group names it, so consecutive and node groups need no separate numbering.
        first_on_node = self.node.allreduce(self.rank, MPI.MIN)
        first = first_on_node if group_size is None else self.rank - self.rank % group_size
        self.local = self.world.Split(color=first, key=self.rank)
        self.group_sizes = self._sizes(first)
        self.group = list(self.group_sizes).index(first)
        self.num_groups = len(self.group_sizes)
        self.num_nodes = len(self._sizes(first_on_node))
        self.cross = self.world.Split(color=self.local.Get_rank(), key=self.group)
        self._comms = {Scope.LOCAL: self.local, Scope.GLOBAL: self.world}
        self._is_free = False
        atexit.register(self.free)

    def _sizes(self, first: int) -> dict[int, int]:
        """Return how many ranks gave each value of `first`, in rising order of the values."""
        return dict(sorted(Counter(self.world.allgather(first)).items()))

    def comm(self, scope: Scope) -> MPI.Comm:
        """Return the communicator of the learners in `scope`."""
        return self._comms[scope]

    def agree(self, error: InputError | None) -> None:
        """Raise the same `InputError` on every rank if any rank brings one; the lowest rank's is taken."""
        for first in self.world.allgather(error):
            if first is not None:
                raise first

    def do_together(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank, waiting asleep for all; an `InputError` on any of them is raised on all."""
        result, error = None, None
        try:
            result = action()
        except InputError as raised:
            error = raised
        wait_asleep(self.world)
        self.agree(error)
        return result  # type: ignore[return-value]  # it is set where agree() returns

    def free(self) -> None:
        """Free the communicators; safe to call twice, called at exit."""
        atexit.unregister(self.free)
        if self._is_free or MPI.Is_finalized():
            return
        self._is_free = True
        for comm in (self.cross, self.local, self.node, self.world):
            comm.Free()


def wait_asleep(comm: MPI.Comm) -> None:
    """Wait for every rank of `comm`, asleep: a busy-polling barrier would take the cores from ranks still starting."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.005)


def install_abort_hook() -> None:
    """Make an uncaught exception, in any thread of any rank, print its traceback once and end the whole job."""

    def abort(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.write(f"hpcavg: rank {MPI.COMM_WORLD.Get_rank()} failed; the job is ended\n{''.join(lines)}")
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)

    def abort_from_thread(args: Any) -> None:
        if args.exc_type is not SystemExit:
            abort(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = abort
    threading.excepthook = abort_from_thread
