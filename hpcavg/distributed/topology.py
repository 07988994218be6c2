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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from mpi4py import MPI

from hpcavg.algorithms.schedule import Scope
from hpcavg.distributed import child_processes
from hpcavg.distributed.job_environment import check_lone, check_sizes
from hpcavg.errors import InputError
from hpcavg.utils import streams

_T = TypeVar("_T")


class Topology:
    """The learners of a run, the servers beside them, and the communicators between them.

    A rank is a learner, except the last `num_servers`, which hold the parameters of an asynchronous algorithm.

    Parameters
    ----------
    comm : the communicator of all learners, ``MPI.COMM_WORLD`` when None. It is duplicated; the original stays free
        for the caller. ``MPI.COMM_SELF`` is for a rank that is meant to be alone.
    group_size : None makes a local group of the ranks that share a node; S makes groups of S consecutive ranks. S need
        not divide the number of learners: the last group is then smaller.
    num_servers : ranks that serve parameters instead of learning, taken from the end.

    Attributes
    ----------
    everyone : all ranks. On a learner `learner_ranks`, `local` and `cross` are all learners; its group; the learners with the
        same rank in each group: `cross` joins the groups, one communicator for every local rank. On a server they are
        the same among the servers. node : the ranks on this node. peers : those of `learner_ranks` among them.
    rank : this rank's index in `all_ranks`; learners come first, so it is a learner's index too.
    num_learners, num_servers, is_server : how many there are of each, and which this rank is.
    group, num_groups : index of the local group and number of groups.
    group_sizes : the number of learners in each group, by the group's lowest rank.
    survives, losses : whether the run goes on without ranks that die, and those that did.
    num_averagers : averagers made so far. has_busy_servers : one of them is served and has not finished.
    watch : what names ranks that hang, from the first averager on; see `hpcavg.distributed.watchdog.watch_over`.
    num_nodes, node_rank : number of nodes, and this rank's index on its own.

    Raises `InputError` on every rank when `group_size` is not within 1..P or no learner is left; and when MPI sees one
    rank alone where a launcher, such as torchrun, has started several.
    """

    survives = False
    losses: Sequence[Any] = ()
    watch: Any = None

    def __init__(self, comm: MPI.Intracomm | None = None, group_size: int | None = None, num_servers: int = 0) -> None:
        install_abort_hook()
        comm = MPI.COMM_WORLD if comm is None else comm
        if comm == MPI.COMM_WORLD:
            check_lone(comm.Get_size())
        check_sizes(comm.Get_size(), group_size, num_servers)
        self.num_servers = num_servers
        self._group_size = group_size
        self._owned: list[MPI.Comm] = []
        self._waiting: Callable[[object, Scope | Sequence[int]], AbstractContextManager[None]]
        self._waiting = lambda what, scope: nullcontext()
        self.num_averagers = 0
        self.has_busy_servers = False
        self._is_free = False
        self._split(comm.Dup())
        atexit.register(self.free)

    def _split(self, all_ranks: MPI.Intracomm) -> None:
        """Make the communicators of all ranks, which are those of `all_ranks`, and find out who is where."""
        self.all_ranks = all_ranks
        self.rank: int = all_ranks.Get_rank()
        self.num_learners: int = all_ranks.Get_size() - self.num_servers
        self.is_server = self.rank >= self.num_learners
        self.learner_ranks = cast(MPI.Intracomm, all_ranks.Split(color=int(self.is_server), key=self.rank))
        self.node = self.split_by_node(all_ranks)
        self.node_rank: int = self.node.Get_rank()
        self.peers = self.split_by_node(self.learner_ranks)
        first_on_node = min(self.node.allgather(self.rank))
        name = self._group_name(first_on_node)
        self.local = self.learner_ranks.Split(color=name, key=self.rank)
        self.group_sizes = dict(sorted(Counter(self.learner_ranks.allgather(name)).items()))
        self.group = list(self.group_sizes).index(name)
        self.num_groups = len(self.group_sizes)
        self.num_nodes = len(set(all_ranks.allgather(first_on_node)))
        self.cross = self.learner_ranks.Split(color=self.local.Get_rank(), key=self.group)
        self._comms = {Scope.LOCAL: self.local, Scope.GLOBAL: self.learner_ranks, Scope.SERVER: self.all_ranks}
        self._background_comms: WeakKeyDictionary[object, dict[Scope, MPI.Comm]] = WeakKeyDictionary()

    def _group_name(self, first_on_node: int) -> int:
        """Return the lowest rank of the local group, which names it: groups of a node and of S need no other name."""
        return first_on_node if self._group_size is None else self.rank - self.rank % self._group_size

    def comm(self, scope: Scope) -> MPI.Comm:
        """Return the communicator of the ranks in `scope`."""
        return self._comms[scope]

    def background_comm(self, scope: Scope, user: object = None) -> MPI.Comm:
        """Return a communicator of the same ranks for what goes on beside `comm`. Collective at its first call.

        user : who uses it, and nobody else does: what two start in the background, ranks may go on with in any order.
        """
        comms = self._background_comms.setdefault(self if user is None else user, {})
        if scope not in comms:
            comms[scope] = self.own(self._comms[scope].Dup())
        return comms[scope]

    def split_by_node(self, comm: MPI.Comm) -> MPI.Comm:
        """Return a communicator of the ranks of `comm` on this node, in their order. Collective over `comm`."""
        return comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.Get_rank())

    def own(self, comm: MPI.Comm) -> MPI.Comm:
        """Return `comm`, which is freed along with the topology's own communicators."""
        if comm != MPI.COMM_NULL:
            self._owned.append(comm)
        return comm

    def raise_everywhere(self, error: InputError | None) -> None:
        """Raise the same `InputError` on every rank if any rank brings one; the lowest rank's is taken."""
        for first in self.all_ranks.allgather(error):
            if first is not None:
                raise first

    def run_on_all_ranks(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank, waiting asleep for all; an `InputError` on any of them is raised on all."""
        result, error = None, None
        try:
            result = action()
        except InputError as raised:
            error = raised
        with self.waiting("start", Scope.SERVER):
            wait_asleep(self.all_ranks)
            self.raise_everywhere(error)
        return result  # type: ignore[return-value]  # it is set where raise_everywhere() returns

    def run_on_first_rank(self, action: Callable[[], _T]) -> _T:
        """Return on every rank what `action` returns on rank 0; see `run_on_all_ranks`."""
        result = self.run_on_all_ranks(lambda: action() if self.rank == 0 else None)
        with self.waiting("start", Scope.SERVER):
            return cast(_T, self.all_ranks.bcast(result, root=0))

    def run_collective(self, action: Callable[[], _T], scope: Scope = Scope.GLOBAL, what: object = "agreement") -> _T:
        """Return what `action` does, which is collective over `scope`; `what` it is, for the watchdog.

        The collectives of a training loop all go through here, to be watched, and repeated by `SurvivingTopology`.
        """
        with self.waiting(what, scope):
            return action()

    def run_retryable(self, action: Callable[[], _T], what: object) -> _T:
        """Return what `action` does; see `run_collective`, of which it lacks that all wait until all have done it."""
        with self.waiting(what, Scope.GLOBAL):
            return action()

    def waiting(self, what: object, scope: Scope | Sequence[int]) -> AbstractContextManager[None]:
        """Return a context in which this rank may wait for others; `what` for, the same on all that take part.

        scope : which ones, or their numbers in `all_ranks`.
        """
        return self._waiting(what, scope)

    def watch_waits(self, waiting: Callable[[object, Scope | Sequence[int]], AbstractContextManager[None]]) -> None:
        """Enter what `waiting` returns wherever this rank may wait for others: it is told for what and for whom."""
        self._waiting = waiting

    def completion(self, comm: MPI.Comm) -> Iterator[bool]:
        """Wait, in steps that yield False, until `SurvivingTopology` can rely on what all of `comm` did before this."""
        yield from ()

    def on_shrink(self, action: Callable[[], None]) -> None:
        """Have `action` called whenever ranks were lost and the communicators are new, which here they never are."""

    @property
    def communicators(self) -> list[MPI.Comm]:
        """All that the topology made or owns, the latest first."""
        return [
            *reversed(self._owned),
            self.cross,
            self.local,
            self.peers,
            self.node,
            self.learner_ranks,
            self.all_ranks,
        ]

    def free(self) -> None:
        """Free the communicators and end the watch. Collective over all ranks, safe to call twice, called at exit."""
        atexit.unregister(self.free)
        if self._is_free or MPI.Is_finalized():
            return
        self._is_free = True
        if self.watch is not None:
            self.watch.close()
        for comm in self.communicators:
            comm.Free()


def wait_asleep(comm: MPI.Comm) -> None:
    """Wait for every rank of `comm`, asleep: a busy-polling barrier would take the cores from ranks still starting."""
    complete_asleep(comm.Ibarrier(), 0.005)


def complete_asleep(request: MPI.Request, interval_s: float) -> None:
    """Wait for `request`; see `wait_until`."""
    wait_until(request.Test, interval_s)


def wait_until(is_there: Callable[[], bool], interval_s: float) -> None:
    """Call `is_there` until it is true: some dozen times at once, then asleep for `interval_s` between two looks.

    What takes microseconds is then not slept through, and what takes longer leaves the core to other ranks.
    """
    for _ in range(50):
        if is_there():
            return
    while not is_there():
        time.sleep(interval_s)


def install_abort_hook(status: int = 1) -> None:
    """Make an uncaught exception, on any rank, print its traceback once and end the whole job; see `on_uncaught`.

    One rank alone keeps nobody waiting, so that its own exceptions are left to Python, unless the job is to end with
    another status than Python's.
    """
    child_processes.require_rank()
    world = MPI.COMM_WORLD
    text = f"rank {world.Get_rank()} failed; the job is ended"
    on_uncaught(text, lambda: world.Abort(status), is_alone=world.Get_size() == 1 and status == 1)


def on_uncaught(text: str, end: Callable[[], None], is_alone: bool = False) -> None:
    """Make an uncaught exception print `text` and its traceback, and then call `end`.

    That is one of the main thread, of the thread that calls this, in which the training is, or of hpcavg's own, which
    have names that begin with "hpcavg": others wait for these. What any other thread raises is printed with the rank,
    and what a user raises at a prompt is printed. Where a rank `is_alone`, only hpcavg's own threads end it.
    """
    rank, training = MPI.COMM_WORLD.Get_rank(), threading.current_thread()

    def say(title: str, error: tuple[Any, Any, Any]) -> None:
        streams.flush()
        streams.tell(f"hpcavg: {title}\n{''.join(traceback.format_exception(*error))}")

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_alone or hasattr(sys, "ps1"):
            sys.__excepthook__(kind, error, trace)
        else:
            say(text, (kind, error, trace))
            end()

    def tell_from_thread(args: Any) -> None:
        if args.exc_type is SystemExit:
            return
        error = args.exc_type, args.exc_value, args.exc_traceback
        name = args.thread.name if args.thread else "without a name"
        if name.startswith("hpcavg") or (args.thread is training and not is_alone):
            say(text, error)
            end()
        elif is_alone:
            threading.__excepthook__(args)
        else:
            say(f"rank {rank} goes on; its thread {name} failed", error)

    sys.excepthook = tell
    threading.excepthook = tell_from_thread
