"""Going on without ranks that die: Open MPI's fault tolerance (ULFM) behind the interface of `Topology`.

A collective that a death interrupts is taken again by the survivors, or counts as taken if one of them had it complete:
then all had their part of it. Nobody uses a result before that is settled, so survivors agree bit for bit.

Every survivor comes here at its next collective, since the first that meets a death revokes all communicators. Each
brings how many collectives it has completed in each scope, and learns whether anyone has completed the one it is in.

A collective that a death interrupts may also end with success and hand out what is in its buffers. Where that is then
made sense of within the collective, as mpi4py does of pickled objects, an exception of any kind may come of a death.
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

# What mpirun --with-ft ulfm sets for the ranks.
_ENABLED = "OMPI_MCA_mpi_ft_enable"
# How long a rank that is done waits for the others to be so, and one that fails for others to fail as well.
_END_WAIT_S = 5.0
_FAREWELL_S = 2.0
# How long the news of a death may take to a rank on which its consequences failed.
_NEWS_S = 1.0
_has_survivors = False


def is_enabled() -> bool:
    """Return whether MPI was started with fault tolerance."""
    return os.environ.get(_ENABLED, "0").lower() in ("1", "true", "yes")


@dataclass(frozen=True)
class Loss:
    """Ranks that died, and what it cost the survivors.

    Attributes
    ----------
    ranks : the ranks that died, numbered as at the start.
    num_learners : number of learners that are left.
    recovery_s : seconds from when this rank met the death until it could go on, waiting for other survivors included.
    """

    ranks: tuple[int, ...]
    num_learners: int
    recovery_s: float


class SurvivingTopology(Topology):
    """A `Topology` that shrinks to the survivors when ranks die. Needs ``mpirun --with-ft ulfm``.

    Survivors keep their local groups; a group that dies out is gone. They are numbered anew, in their old order.

    Attributes
    ----------
    losses : the deaths so far.
    origin : this rank's number at the start.

    Raises
    ------
    InputError
        If MPI was started without fault tolerance.
    """

    survives = True

    def __init__(self, comm: MPI.Intracomm | None = None, group_size: int | None = None) -> None:
        if not is_enabled():
            allowed = "abort or restart here, or Open MPI started with fault tolerance: mpirun --with-ft ulfm"
            raise InputError("on_failure", "shrink", allowed)
        self._name: int | None = None
        self._completed = dict.fromkeys((LOCAL, GLOBAL, SERVER), 0)
        self._renewals: list[Callable[[], None]] = []
        self.losses: list[Loss] = []
        global _has_survivors
        _has_survivors = True
        super().__init__(comm, group_size)
        self.origin = self.rank
        self._members: list[int] = self.all_ranks.allgather(self.origin)
        install_farewell_hook(self)

    def _group_name(self, first_on_node: int) -> int:
        if self._name is None:
            self._name = super()._group_name(first_on_node)
        return self._name

    def on_shrink(self, action: Callable[[], None]) -> None:
        """Have `action` called whenever ranks were lost and the communicators are new.

        It may communicate; it is repeated if more ranks die meanwhile.
        """
        self._renewals.append(action)

    def _split(self, all_ranks: MPI.Intracomm) -> None:
        super()._split(all_ranks)
        self._farewell = all_ranks.Dup()

    def is_abandoned(self) -> bool:
        """Return whether all ranks that are left have called this, having failed; waits for them some seconds."""
        until = time.monotonic() + _FAREWELL_S
        try:
            request = self._farewell.Iagree(array("i", [1]))
            while not request.Test():
                if time.monotonic() > until:
                    return False
                time.sleep(0.01)
        except MPI.Exception as error:  # what agreement ends with where ranks are dead, when all others have come
            return bool(error.Get_error_class() == MPI.ERR_PROC_FAILED)
        return True

    def ranks_of(self, scope: Scope) -> Sequence[int]:
        """Return the ranks that this rank meets in `scope`; after a mean of neighbours it waits for all learners.

        Without that, a learner could be steps ahead of another one when a rank dies, and could no longer give it the
        parameters that their mean needs.
        """
        return super().ranks_of(GLOBAL if isinstance(scope, Neighbours) else scope)

    # -- collectives ----------------------------------------------------------------------------------------------

    def run_collective(self, action: Callable[[], _T], scope: Scope = GLOBAL, what: object = "agreement") -> _T:
        """Return what `action` does, which is collective over `scope`; take it again where ranks die.

        It must not call this method again, nor change anything that it reads: that is for after it.
        """
        results: list[_T] = []
        counted_as = GLOBAL if isinstance(scope, Neighbours) else scope

        def act() -> None:
            results[:] = [action()]
            self.comm(scope).Barrier()  # all have it

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
        """Return what `action` does, again after a recovery; it knows itself what others have done of it."""
        results: list[_T] = []
        while not results:
            try:
                results.append(super().run_retryable(action, what))
            except Exception as error:  # noqa: PERF203  perhaps a death
                self.recover(error)
        return results[0]

    def completion(self, comm: MPI.Comm) -> Iterator[bool]:
        """Wait, in steps that yield False, until all of `comm` have come as far."""
        request = comm.Ibarrier()
        while not request.Test():
            yield False

    # -- recovery -------------------------------------------------------------------------------------------------

    def recover(self, error: Exception) -> None:
        """Go on with the survivors: new communicators, and what others had registered with `on_shrink`.

        Raises `error` where nobody has died: it is then none of this module's.
        """
        met = time.perf_counter()
        if not self._may_come_of_a_death(error):
            raise error
        before = self._members
        # Of nobody in particular: all who are left, under whatever number.
        with self.waiting("recovery from a death", ()):
            self._renew(error, before)
        lost = tuple(rank for rank in before if rank not in self._members)
        self.losses.append(Loss(lost, self.num_learners, time.perf_counter() - met))

    def _renew(self, error: Exception, before: list[int]) -> None:
        """Make new communicators, until nobody dies meanwhile; raise `error` where nobody had."""
        while True:
            self._revoke()
            self._owned.clear()
            try:
                self._split(cast(MPI.Intracomm, self.all_ranks.Shrink()))
                self._members = self.all_ranks.allgather(self.origin)
                if len(self._members) == len(before):
                    raise error
                for scope in self._completed:
                    self._completed[scope] = max(self.comm(scope).allgather(self._completed[scope]))
                for action in self._renewals:
                    action()
                self.all_ranks.Barrier()
                return
            except Exception as raised:
                if raised is error or not self._may_come_of_a_death(raised):
                    raise

    def _may_come_of_a_death(self, error: Exception) -> bool:
        """Return whether `error` is MPI's, or somebody has died; waits for the news of it."""
        if isinstance(error, MPI.Exception):
            return True
        until = time.monotonic() + _NEWS_S
        while time.monotonic() < until:
            if self.all_ranks.Is_revoked() or self.all_ranks.Get_failed().Get_size():
                return True
            MPI.COMM_SELF.Iprobe()  # MPI learns of a death while it is called
            time.sleep(0.01)
        return False

    def _revoke(self) -> None:
        """Wake everybody who waits in one of the communicators, and let everybody else find out."""
        for comm in self.communicators:
            if comm != MPI.COMM_NULL:
                comm.Revoke()

    def free(self) -> None:
        """Let the other survivors get as far as this: a rank that is gone counts as dead to whoever is not.

        Nothing is freed: that would need the dead, who may have died just now.
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
    """End MPI, except where ranks may die: it would wait for what they owe, and is left as it is."""
    if not _has_survivors and not MPI.Is_finalized():
        MPI.Finalize()


def install_farewell_hook(topology: SurvivingTopology) -> None:
    """Make an uncaught exception, in any thread, print its traceback and end this rank alone.

    Only a process that a signal ends is dead in the eyes of MPI; one that exits would be waited for. The launcher takes
    no notice of signals, though, so where all that are left fail they exit: the job must not end with status 0.
    """

    def leave() -> None:
        if topology.is_abandoned():
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)

    on_uncaught(f"rank {topology.origin} failed; the others go on without it", leave)
