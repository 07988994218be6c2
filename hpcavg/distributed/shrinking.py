"""A topology that survives deaths of ranks, by Open MPI's fault tolerance (ULFM).

If a death interrupts a collective, the survivors repeat it. If one of them has completed it, then all have their part
of the result, and it counts as completed. No rank uses a result before this is decided: survivors agree bit for bit.

The first survivor that meets a death revokes all communicators. Every other survivor therefore comes here at its next
collective. The survivors exchange the numbers of collectives that they have completed in each scope, and so learn
whether one has completed the current one.

A collective that a death interrupts may also end with success and return the content of its buffers. If it then
interprets them, as mpi4py does with pickled objects, a death may cause an exception of any type.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, cast

from mpi4py import MPI

from hpcavg.algorithms.scope import GLOBAL, LOCAL, SERVER, Neighbours, Scope
from hpcavg.distributed.abort import on_uncaught
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import wait_until
from hpcavg.errors import InputError

_T = TypeVar("_T")

# mpirun --with-ft ulfm sets this variable for the ranks.
_ENABLED = "OMPI_MCA_mpi_ft_enable"
# Time that a rank waits at its end for the others to end.
_END_WAIT_S = 5.0
# Time that a rank waits after a failure for the others to fail, too.
_ALL_FAILED_S = 2.0
# Time until MPI reports a death on a rank that has already met an error because of it.
_NEWS_S = 1.0
_has_survivors = False


def is_enabled() -> bool:
    """Return whether MPI was started with fault tolerance."""
    return os.environ.get(_ENABLED, "0").lower() in ("1", "true", "yes")


@dataclass(frozen=True)
class Loss:
    """A death of ranks, and its cost.

    Attributes
    ----------
    ranks : the ranks that died, by their numbers at the start.
    num_learners : number of learners that are left.
    recovery_s : seconds that this rank needed to recover, including the wait for other survivors.
    """

    ranks: tuple[int, ...]
    num_learners: int
    recovery_s: float


class SurvivingTopology(Topology):
    """A `Topology` that shrinks to the survivors when ranks die. It needs ``mpirun --with-ft ulfm``.

    The learners of a dead rank are lost. Survivors keep their local groups; a group without survivors disappears.
    Surviving ranks and their learners get new numbers, in the same order.

    Parameters
    ----------
    comm : see `Topology`.
    group_size : see `Topology`.
    learners_per_rank : see `Topology`.

    Attributes
    ----------
    losses : the deaths so far.
    origin : this rank's number at the start.

    Raises
    ------
    InputError
        If MPI was started without fault tolerance, or as `Topology` does.
    """

    survives = True

    def __init__(
        self, comm: MPI.Intracomm | None = None, group_size: int | None = None, learners_per_rank: int = 1
    ) -> None:
        if not is_enabled():
            allowed = "abort or restart here, or Open MPI started with fault tolerance: mpirun --with-ft ulfm"
            raise InputError("on_failure", "shrink", allowed)
        self._own_group_names: list[int] | None = None
        self._completed = dict.fromkeys((LOCAL, GLOBAL, SERVER), 0)
        self._shrink_actions: list[Callable[[], None]] = []
        self.losses: list[Loss] = []
        global _has_survivors
        _has_survivors = True
        super().__init__(comm, group_size, learners_per_rank=learners_per_rank)
        self.origin = self.rank
        self._origins: list[int] = self.all_ranks.allgather(self.origin)
        install_leave_hook(self)

    def _group_names(self, first_on_node: int) -> list[int]:
        if self._own_group_names is None:
            self._own_group_names = super()._group_names(first_on_node)
        return self._own_group_names

    def on_shrink(self, action: Callable[[], None]) -> None:
        """Call `action` after every loss of ranks, with new communicators.

        It may communicate. It is repeated if more ranks die meanwhile.
        """
        self._shrink_actions.append(action)

    def _split(self, all_ranks: MPI.Intracomm) -> None:
        super()._split(all_ranks)
        self._failing_ranks = all_ranks.Dup()

    def have_all_failed(self) -> bool:
        """Return whether all remaining ranks have failed; a rank that fails calls this. Waits some seconds for them."""
        until = time.monotonic() + _ALL_FAILED_S
        try:
            request = self._failing_ranks.Iagree(array("i", [1]))
            while not request.Test():
                if time.monotonic() > until:
                    return False
                time.sleep(0.01)
        except MPI.Exception as error:  # the error of an agreement that all remaining ranks joined, with dead ranks
            return bool(error.Get_error_class() == MPI.ERR_PROC_FAILED)
        return True

    def ranks_of(self, scope: Scope) -> Sequence[int]:
        """Return the ranks that take part in `scope`. For `Neighbours`, all learners take part.

        Otherwise a learner could be steps ahead of another one when a rank dies, and would no longer have the
        parameters that the other one's mean needs.
        """
        return super().ranks_of(GLOBAL if isinstance(scope, Neighbours) else scope)

    # -- collectives ----------------------------------------------------------------------------------------------

    def run_collective(self, action: Callable[[], _T], scope: Scope = GLOBAL, what: object = "agreement") -> _T:
        """Run the collective `action` and return its result; repeat it if ranks die. See `Topology.run_collective`.

        The action must not call this method, and must not change what it reads.
        """
        results: list[_T] = []
        counted_as = GLOBAL if isinstance(scope, Neighbours) else scope

        def act() -> None:
            results[:] = [action()]
            self.comm(scope).Barrier()  # after it, all ranks have the result

        while True:
            try:
                super().run_collective(act, scope, what)
            except Exception as error:
                counted = self._completed[counted_as]
                self.recover(error)
                if self._completed[counted_as] == counted:
                    continue
            else:
                self._completed[counted_as] += 1
            return results[0]

    def run_retryable(self, action: Callable[[], _T], what: object) -> _T:
        """Run `action` and return its result; repeat it after a recovery. See `Topology.run_retryable`."""
        results: list[_T] = []
        while not results:
            try:
                results.append(super().run_retryable(action, what))
            except Exception as error:  # noqa: PERF203  perhaps because of a death
                self.recover(error)
        return results[0]

    def completion(self, comm: MPI.Comm) -> Iterator[bool]:
        """Wait until all ranks of `comm` are here; each step yields False."""
        request = comm.Ibarrier()
        while not request.Test():
            yield False

    # -- recovery -------------------------------------------------------------------------------------------------

    def recover(self, error: Exception) -> None:
        """Continue with the survivors: make new communicators and call the actions of `on_shrink`.

        Parameters
        ----------
        error : the exception that this rank met. It is raised again if no rank has died.
        """
        started = time.perf_counter()
        if not self._may_be_a_death(error):
            raise error
        before = self._origins
        # The survivors have no common numbers yet: the wait names no ranks.
        with self.waiting("recovery from a death", ()):
            self._rebuild(error, before)
        lost = tuple(rank for rank in before if rank not in self._origins)
        self.losses.append(Loss(lost, self.num_learners, time.perf_counter() - started))

    def _rebuild(self, error: Exception, before: list[int]) -> None:
        """Make new communicators, and repeat this if ranks die meanwhile. Raise `error` if no rank has died."""
        while True:
            self._revoke()
            self._owned.clear()
            try:
                self._split(cast(MPI.Intracomm, self.all_ranks.Shrink()))
                self._origins = self.all_ranks.allgather(self.origin)
                if len(self._origins) == len(before):
                    raise error
                for scope in self._completed:
                    self._completed[scope] = max(self.comm(scope).allgather(self._completed[scope]))
                for action in self._shrink_actions:
                    action()
                self.all_ranks.Barrier()
                return
            except Exception as raised:
                if raised is error or not self._may_be_a_death(raised):
                    raise

    def _may_be_a_death(self, error: Exception) -> bool:
        """Return whether `error` is an MPI error or a rank has died. Waits a second for MPI to report a death."""
        if isinstance(error, MPI.Exception):
            return True
        until = time.monotonic() + _NEWS_S
        while time.monotonic() < until:
            if self.all_ranks.Is_revoked() or self.all_ranks.Get_failed().Get_size():
                return True
            MPI.COMM_SELF.Iprobe()  # MPI detects deaths only during calls
            time.sleep(0.01)
        return False

    def _revoke(self) -> None:
        """Revoke all communicators: ranks that wait in one of them get an error now, others at their next call."""
        for comm in self.communicators:
            if comm != MPI.COMM_NULL:
                comm.Revoke()

    def free(self) -> None:
        """Wait until the other survivors end, too: a rank that has ended counts as dead for the others.

        Communicators are not freed: dead ranks make this impossible, and a rank may have died just now.
        """
        atexit.unregister(self.free)
        if self._is_free:
            return
        self._is_free = True
        if self.watch is not None:
            self.watch.abandon()
        with suppress(MPI.Exception):
            request, until = self.all_ranks.Ibarrier(), time.monotonic() + _END_WAIT_S
            wait_until(lambda: request.Test() or time.monotonic() > until, 0.005)


def finalize() -> None:
    """Finalize MPI, unless ranks may die: then MPI would wait for dead ranks."""
    if not _has_survivors and not MPI.Is_finalized():
        MPI.Finalize()


def install_leave_hook(topology: SurvivingTopology) -> None:
    """Make an uncaught exception of any thread print its traceback and end this rank alone.

    A rank ends by SIGKILL, since MPI would wait for a process that exits. If all remaining ranks fail, they exit with
    status 1: the launcher ignores deaths by signals, and the job must not end with status 0.
    """

    def leave() -> None:
        if topology.have_all_failed():
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)

    on_uncaught(f"rank {topology.origin} failed; the others go on without it", leave)
