"""The ranks of a job: learners and servers, nodes and local groups, and the communicators between them.

Importing this module starts MPI, as mpi4py does.
"""

from __future__ import annotations

import atexit
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

from mpi4py import MPI

from hpcavg.algorithms.scope import GLOBAL, LOCAL, SERVER, Neighbours, Scope
from hpcavg.distributed.abort import install_abort_hook
from hpcavg.distributed.job_environment import check_lone, check_sizes
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.errors import InputError
from hpcavg.utils.text import fold_numbers

_T = TypeVar("_T")
# A rule may bring a new graph to every mean: the oldest are dropped. Graphs used in turn are fewer.
_MAX_GRAPHS = 64


class Links(NamedTuple):
    """The edges of this rank's learners on the graph of a `Neighbours` scope.

    Attributes
    ----------
    weights : for each learner of this rank, the weight of each learner in its mean, by learner in ascending order.
    sources : the learners of other ranks whose parameters this rank needs, by rank; both in ascending order.
    targets : the learners of this rank whose parameters other ranks need, by rank; both in ascending order.
    """

    weights: tuple[dict[int, float], ...]
    sources: dict[int, list[int]]
    targets: dict[int, list[int]]

    @property
    def partners(self) -> list[int]:
        """The ranks of all sources and targets, in ascending order."""
        return sorted({*self.sources, *self.targets})


class Topology:
    """The learners and servers of a run, and the communicators between them.

    A rank holds `learners_per_rank` learners. The last `num_servers` ranks hold no learner: they hold the parameters
    of an asynchronous algorithm.

    Parameters
    ----------
    comm : the communicator of all ranks; None means ``MPI.COMM_WORLD``. The topology uses a duplicate. Use
        ``MPI.COMM_SELF`` for a single rank.
    group_size : number of consecutive learners in a local group: a multiple or a divisor of `learners_per_rank`. The
        last group may be smaller. None: the learners of each node form a local group.
    num_servers : number of ranks that serve parameters instead of learning.
    learners_per_rank : number of learners of each rank with learners, R. Learner i is row ``i % R`` of rank ``i // R``.

    Attributes
    ----------
    all_ranks : communicator of all ranks.
    learner_ranks : communicator of the ranks with learners; on a server, communicator of the servers.
    local : communicator of the ranks of this rank's local group; of this rank alone if it holds whole groups.
    node : communicator of the ranks on this node.
    peers : communicator of the ranks of `learner_ranks` on this node.
    peer_ranks : these ranks as indices in `all_ranks`.
    rank : index of this rank in `all_ranks`. Ranks with learners come first, and have the same index in
        `learner_ranks`.
    num_ranks : number of all ranks.
    num_learner_ranks : number of ranks with learners.
    num_learners : number of learners, P.
    learners_per_rank : number of learners of each rank with learners.
    learners : indices of this rank's learners.
    num_servers : number of servers.
    is_server : whether this rank is a server.
    group : index of the local group of this rank's first learner.
    num_groups : number of local groups.
    group_sizes : number of learners in each group, by the group's first learner at the start.
    groups_here : for each local group with learners of this rank, the slice of their rows.
    num_nodes : number of nodes.
    node_rank : index of this rank on its node.
    survives : whether the run continues if ranks die.
    losses : the deaths so far.
    num_averagers : number of averagers made so far.
    has_busy_servers : whether the servers serve an averager that has not finished.
    room_bytes : bytes of small arrays that travel with every report of a learner; see `hpcavg.averaging.calls`.
    watch : the `hpcavg.distributed.watchdog.Watch` that reports hung ranks; None before the first averager.

    Raises
    ------
    InputError
        On every rank, if `group_size` is not within 1..P or does not fit `learners_per_rank`, if no learner is left,
        or if MPI sees one rank but a launcher, such as torchrun, has started several.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> topology = Topology(MPI.COMM_SELF)
    >>> topology.num_learners, topology.num_nodes, list(topology.learners)
    (1, 1, [0])
    >>> topology = Topology(MPI.COMM_SELF, group_size=2, learners_per_rank=4)
    >>> topology.num_learners, topology.group_sizes, topology.groups_here
    (4, {0: 2, 2: 2}, [slice(0, 2, None), slice(2, 4, None)])
    """

    survives = False
    losses: Sequence[Any] = ()
    watch: Any = None

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        group_size: int | None = None,
        num_servers: int = 0,
        learners_per_rank: int = 1,
    ) -> None:
        install_abort_hook()
        comm = MPI.COMM_WORLD if comm is None else comm
        if comm == MPI.COMM_WORLD:
            check_lone(comm.Get_size())
        check_sizes(comm.Get_size(), group_size, num_servers, learners_per_rank)
        of_ranks = comm.allgather(learners_per_rank)
        if len(set(of_ranks)) > 1:
            given = f"{learners_per_rank} on rank {comm.Get_rank()}"
            raise InputError(
                "learners_per_rank", given, f"the same on all ranks, not {fold_numbers(sorted(set(of_ranks)))}"
            )
        self.learners_per_rank = learners_per_rank
        self.num_servers = num_servers
        self._group_size = group_size
        self._owned: list[MPI.Comm] = []
        self._free_actions: list[Callable[[], None]] = []
        self._waiting: Callable[[object, Sequence[int]], AbstractContextManager[None]] | None = None
        self.num_averagers = 0
        self.room_bytes = 0
        self.has_busy_servers = False
        self._is_free = False
        self._split(comm.Dup())
        atexit.register(self.free)

    def _split(self, all_ranks: MPI.Intracomm) -> None:
        """Make the communicators from `all_ranks`, and find nodes and groups. Collective over `all_ranks`."""
        self.all_ranks = all_ranks
        self.rank: int = all_ranks.Get_rank()
        self.num_ranks: int = all_ranks.Get_size()
        self.num_learner_ranks: int = self.num_ranks - self.num_servers
        self.num_learners: int = self.num_learner_ranks * self.learners_per_rank
        self.is_server = self.rank >= self.num_learner_ranks
        first = self.rank * self.learners_per_rank
        self.learners = range(first, first if self.is_server else first + self.learners_per_rank)
        self.learner_ranks = cast(MPI.Intracomm, all_ranks.Split(color=int(self.is_server), key=self.rank))
        self.node = self.split_by_node(all_ranks)
        self.node_rank: int = self.node.Get_rank()
        self.peers = self.split_by_node(self.learner_ranks)
        self.peer_ranks = self._indices_of(self.peers)
        first_on_node = min(self.node.allgather(self.rank))
        names = self._group_names(first_on_node)
        self.local = self.learner_ranks.Split(color=names[0], key=self.rank)
        self.group_sizes = dict(sorted(Counter(chain(*self.learner_ranks.allgather(names))).items()))
        self.group = list(self.group_sizes).index(names[0])
        self.num_groups = len(self.group_sizes)
        starts = [row for row, name in enumerate(names) if row == 0 or name != names[row - 1]]
        self.groups_here = list(map(slice, starts, [*starts[1:], len(names)]))
        self._node_names = all_ranks.allgather(first_on_node)
        self.num_nodes = len(set(self._node_names))
        # By the names of scopes, whose hashes Python keeps.
        self._comms = {LOCAL.name: self.local, GLOBAL.name: self.learner_ranks, SERVER.name: self.all_ranks}
        self._background_comms: WeakKeyDictionary[object, dict[Scope, MPI.Comm]] = WeakKeyDictionary()
        self._ranks: dict[str, Sequence[int]] = {}
        self._by_node: dict[Scope, Sequence[Sequence[int]]] = {}
        self._links: dict[Neighbours, Links] = {}

    def _group_names(self, first_on_node: int) -> list[int]:
        """Return the name of the local group of each learner here: the first learner in it."""
        first, size = self.rank * self.learners_per_rank, self._group_size
        learners = range(first, first + self.learners_per_rank)
        if size is None:
            return [first_on_node * self.learners_per_rank for _ in learners]
        return [learner - learner % size for learner in learners]

    # -- scopes ---------------------------------------------------------------------------------------------------

    def comm(self, scope: Scope) -> MPI.Comm:
        """Return the communicator for collectives over `scope`.

        For `Neighbours`, this is the communicator of all ranks with learners.
        """
        return self._comms[GLOBAL.name if isinstance(scope, Neighbours) else scope.name]

    def background_comm(self, scope: Scope, user: object = None) -> MPI.Comm:
        """Return a duplicate of `comm` for means in the background. Collective over the scope at the first call.

        Parameters
        ----------
        scope : the ranks.
        user : the only user of the communicator. Two users of one communicator could start their means in different
            orders on different ranks.
        """
        comms = self._background_comms.setdefault(self if user is None else user, {})
        if scope not in comms:
            comms[scope] = self.own(self.comm(scope).Dup())
        return comms[scope]

    def ranks_of(self, scope: Scope) -> Sequence[int]:
        """Return the ranks that take part in `scope`, with this rank, as indices in `all_ranks`."""
        if isinstance(scope, Neighbours):
            return sorted({*self.links(scope).partners, self.rank})
        if scope.name not in self._ranks:
            self._ranks[scope.name] = self._indices_of(self.comm(scope))
        return self._ranks[scope.name]

    def by_node(self, scope: Scope) -> Sequence[Sequence[int]]:
        """Return the ranks of ``comm(scope)`` on each node, as indices in it."""
        if scope not in self._by_node:
            nodes: dict[int, list[int]] = {}
            for index, rank in enumerate(self.ranks_of(scope)):
                nodes.setdefault(self._node_names[rank], []).append(index)
            self._by_node[scope] = list(nodes.values())
        return self._by_node[scope]

    def _indices_of(self, comm: MPI.Comm) -> Sequence[int]:
        """Return the ranks of `comm` as indices in `all_ranks`."""
        return list(comm.Get_group().Translate_ranks(None, self.all_ranks.Get_group()))

    def links(self, scope: Neighbours) -> Links:
        """Return the edges of this rank on the graph of `scope`.

        Raises
        ------
        InputError
            On every rank, if the weights are not doubly stochastic.
        """
        if scope not in self._links:
            if len(self._links) == _MAX_GRAPHS:
                del self._links[next(iter(self._links))]
            matrix = scope.matrix(self.num_learners)
            weights = tuple(dict(sorted(matrix[learner].items())) for learner in self.learners)
            needed = {(self.rank_of(source), source) for row in weights for source in row}
            here = set(self.learners)
            wanted = {(self.rank_of(learner), own) for learner, row in enumerate(matrix) for own in here & row.keys()}
            self._links[scope] = Links(weights, self._by_other_rank(needed), self._by_other_rank(wanted))
        return self._links[scope]

    def rank_of(self, learner: int) -> int:
        """Return the rank that holds `learner`."""
        return learner // self.learners_per_rank

    def _by_other_rank(self, pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
        """Return the learners in `pairs` of a rank and a learner, by rank, without this rank; both in order."""
        found: dict[int, list[int]] = {}
        for rank, learner in sorted(pairs):
            if rank != self.rank:
                found.setdefault(rank, []).append(learner)
        return found

    # -- communicators --------------------------------------------------------------------------------------------

    def split_by_node(self, comm: MPI.Comm) -> MPI.Comm:
        """Return the communicator of the ranks of `comm` on this node, in the same order. Collective over `comm`."""
        return comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.Get_rank())

    def own(self, comm: MPI.Comm) -> MPI.Comm:
        """Take over `comm` and return it: `free` frees it, too."""
        if comm != MPI.COMM_NULL:
            self._owned.append(comm)
        return comm

    @property
    def communicators(self) -> list[MPI.Comm]:
        """All communicators that the topology made or owns, the newest first."""
        return [*reversed(self._owned), self.local, self.peers, self.node, self.learner_ranks, self.all_ranks]

    def on_free(self, action: Callable[[], None]) -> None:
        """Call `action` before the communicators are freed. It may be collective over the learners."""
        self._free_actions.append(action)

    def free(self) -> None:
        """Free the communicators and end the watch. Collective over all ranks. Called at exit; may be called twice."""
        atexit.unregister(self.free)
        if self._is_free or MPI.Is_finalized():
            return
        self._is_free = True
        if self.watch is not None:
            self.watch.close()
        for action in self._free_actions:
            action()
        for comm in self.communicators:
            comm.Free()

    # -- running on all ranks -------------------------------------------------------------------------------------

    def raise_everywhere(self, error: InputError | None) -> None:
        """Raise the same `InputError` on every rank if any rank has an `error`: that of the lowest rank."""
        for first in self.all_ranks.allgather(error):
            if first is not None:
                raise first

    def run_on_all_ranks(self, action: Callable[[], _T]) -> _T:
        """Run `action` on every rank, wait for all ranks asleep, and return the result of this rank's `action`.

        Raises
        ------
        InputError
            On every rank, if `action` raises one on any rank.
        """
        result, error = None, None
        try:
            result = action()
        except InputError as raised:
            error = raised
        with self.waiting("start", SERVER):
            wait_asleep(self.all_ranks)
            self.raise_everywhere(error)
        return result  # type: ignore[return-value]  # it is set if raise_everywhere() returns

    def run_on_first_rank(self, action: Callable[[], _T]) -> _T:
        """Run `action` on rank 0 and return its result on every rank; see `run_on_all_ranks`."""
        result = self.run_on_all_ranks(lambda: action() if self.rank == 0 else None)
        with self.waiting("start", SERVER):
            return cast(_T, self.all_ranks.bcast(result, root=0))

    def run_collective(self, action: Callable[[], _T], scope: Scope = GLOBAL, what: object = "agreement") -> _T:
        """Run the collective `action` and return its result.

        Every collective of a training loop goes through this method: the watchdog watches it here, and
        `SurvivingTopology` repeats it here.

        Parameters
        ----------
        action : the collective.
        scope : the ranks that take part.
        what : its name in watchdog reports, the same on all ranks that take part.

        Examples
        --------
        >>> from mpi4py import MPI
        >>> topology = Topology(MPI.COMM_SELF)
        >>> topology.run_collective(lambda: topology.learner_ranks.allgather(topology.rank), what="list of ranks")
        [0]
        """
        with self.waiting(what, scope):
            return action()

    def run_retryable(self, action: Callable[[], _T], what: object) -> _T:
        """Run `action` and return its result. Unlike `run_collective`, it does not wait until all ranks are done.

        Parameters
        ----------
        action : may run again after a death; it must know itself what other ranks have done.
        what : its name in watchdog reports.
        """
        with self.waiting(what, GLOBAL):
            return action()

    # -- watching and surviving -----------------------------------------------------------------------------------

    def waiting(self, what: object, ranks: Scope | Sequence[int]) -> AbstractContextManager[None]:
        """Return a context in which the watchdog knows that this rank waits for others.

        Parameters
        ----------
        what : name of the wait, the same on all ranks that take part.
        ranks : the ranks that take part, as a scope or as indices in `all_ranks`.
        """
        if self._waiting is None:
            return nullcontext()
        return self._waiting(what, self.ranks_of(ranks) if isinstance(ranks, Scope) else ranks)

    def watch_waits(self, waiting: Callable[[object, Sequence[int]], AbstractContextManager[None]]) -> None:
        """Enter the context ``waiting(what, ranks)`` in every wait from now on; `ranks` are indices in `all_ranks`."""
        self._waiting = waiting

    def completion(self, comm: MPI.Comm) -> Iterator[bool]:
        """Wait until all ranks of `comm` are here, if ranks may die; each step yields False. Here, nothing to do."""
        yield from ()

    def on_shrink(self, action: Callable[[], None]) -> None:
        """Call `action` after every loss of ranks, with new communicators. Here, ranks are never lost."""
