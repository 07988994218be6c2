"""The identity of collectives: an exchange before every mean, in which each learner reports the call that it is in.

MPI pairs collectives by their order alone. If one learner runs out of data and calls `finish` while the others take the
mean of step 12, MPI would average both, and the learners would continue with different models. All reports have the
same size and travel in the same MPI call, so they are compared before anything is merged.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Collection, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from mpi4py import MPI

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL, Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import complete_asleep
from hpcavg.engines.reduction import Values
from hpcavg.errors import MismatchError

# The first bytes of a record. A collective of the user on the same communicator does not have them.
_MARK = b"avg1"
# Mark, kind, averager, step, round, flags, fingerprint, learning rate: what is nearly always equal on all ranks.
_RECORD = struct.Struct("<4sHHqqQQd")
_TOLD_NUMBERS = 3
_LINE_BYTES = 64

Told: TypeAlias = tuple[float, float, float]
"""What a learner tells the others for the schedule: loss, seconds per step, and number of steps."""
_SICK, _LARGE, _FAILED = 1, 2, 4
_POLL_S = 0.0005
_TAG = 78


class Kind(IntEnum):
    """The kinds of collective calls of an averager."""

    LOCAL_AVERAGE = 1
    GLOBAL_AVERAGE = 2
    FINISH = 3
    MEAN_MODEL = 4
    RECOMPUTE_BUFFERS = 5
    CHECK_HEALTH = 6
    RESET_ANCHOR = 7
    FIRST_STEP = 8
    NEIGHBOUR_AVERAGE = 9


_AVERAGES = (Kind.LOCAL_AVERAGE, Kind.GLOBAL_AVERAGE, Kind.NEIGHBOUR_AVERAGE)


def kind_of(scope: Scope) -> Kind:
    """Return the kind of a rule's mean over `scope`."""
    if isinstance(scope, Neighbours):
        return Kind.NEIGHBOUR_AVERAGE
    return Kind.GLOBAL_AVERAGE if scope is GLOBAL else Kind.LOCAL_AVERAGE


class Call(NamedTuple):
    """One collective call of an averager.

    Attributes
    ----------
    kind : the kind of call.
    averager : the averager's number on its topology, from 0.
    step : the learner's step; None if learners may differ in it.
    round : the learner's round; None if learners may differ in it.
    """

    kind: Kind
    averager: int
    step: int | None
    round: int | None

    def __str__(self) -> str:
        name = self.kind.name.lower()
        is_average = self.kind in _AVERAGES
        text = name.replace("_", " ") if is_average or self.kind is Kind.FIRST_STEP else f"averager.{name}()"
        if self.step is not None:
            text += f" of step {self.step}" if is_average else f" after step {self.step}"
        elif self.round is not None:
            text += f" of round {self.round + 1}" if is_average else f" in round {self.round + 1}"
        return f"{text} (averager {self.averager + 1})" if self.averager else text


@functools.cache
def _details(learners: int) -> struct.Struct:
    """Return the form of what follows a record: small arrays come after it, on a cache line of their own.

    It has three numbers of each learner for the schedule, and a byte that tells whether it is sick.
    """
    form = f"<{_TOLD_NUMBERS * learners}d{learners}s"
    return struct.Struct(f"{form}{-(_RECORD.size + struct.calcsize(form)) % _LINE_BYTES}x")


@functools.cache
def _no_details(learners: int) -> bytes:
    """Return the details if the learners tell nothing and none is sick."""
    return _details(learners).pack(*[math.nan] * (_TOLD_NUMBERS * learners), b"")


class Meeting(NamedTuple):
    """What the learners in one call reported.

    Attributes
    ----------
    num_members : number of learners in the call.
    sick : the indices of the sick learners.
    is_large : a sum over the learners may overflow.
    fingerprints : the fingerprint of every rank.
    rate : the mean of their learning rates.
    gathered : the messages of all ranks.
    """

    num_members: int
    sick: tuple[int, ...]
    is_large: bool
    fingerprints: Sequence[int]
    rate: float
    gathered: bytes | bytearray

    @property
    def told(self) -> Values:
        """What each learner told for the schedule, shape (learners, 3), float64."""
        end = _RECORD.size + 8 * _TOLD_NUMBERS * self._learners_per_rank
        told = np.ascontiguousarray(self._messages[:, _RECORD.size : end])
        return told.view(np.float64).reshape(-1, _TOLD_NUMBERS)

    @property
    def packed(self) -> Values:
        """The small arrays of each rank, shape (ranks, bytes)."""
        return self._messages[:, _RECORD.size + _details(self._learners_per_rank).size :]

    @property
    def _messages(self) -> Values:
        return _by_rank(self.gathered, len(self.fingerprints))

    @property
    def _learners_per_rank(self) -> int:
        return self.num_members // len(self.fingerprints)


def meet(
    call: Call,
    scope: Scope,
    topology: Topology,
    *,
    sick: Collection[int] = (),
    is_large: bool = False,
    fingerprint: int = 0,
    rate: float = 0.0,
    error: Exception | None = None,
    asleep: bool = False,
    told: Sequence[Told] | None = None,
    packed: Values | None = None,
) -> Meeting:
    """Exchange reports with the learners of `scope`; check that all are in the same call. Collective over the scope.

    Parameters
    ----------
    call : this rank's call.
    scope : the learners that take part.
    topology : all learners.
    sick : the rows of the learners of this rank whose parameters are not finite.
    is_large : values of this rank are so large that a sum over the learners may overflow.
    fingerprint : 64 bits for the caller to compare.
    rate : this rank's learning rate.
    error : an error on this rank. It is raised on all ranks of the scope; on a graph, neighbours raise a `RuntimeError`
        that names this rank.
    asleep : wait without using the core, for ranks that come at very different times. The same on all ranks.
    told : what each learner of this rank tells for the schedule.
    packed : the bytes of small arrays, at most `Topology.room_bytes`. All messages have this room, whatever the call.

    Raises
    ------
    MismatchError
        On all learners of the scope, if they are in different calls.
    """
    flags = _SICK * bool(sick) | _LARGE * is_large | _FAILED * (error is not None)
    kind, averager, step, round_ = call
    learners = topology.learners_per_rank
    record = _RECORD.pack(
        *(_MARK, kind, averager, -1 if step is None else step, -1 if round_ is None else round_),
        *(flags, fingerprint, rate),
    )
    if told is None and not sick:
        own = record + _no_details(learners)
    else:
        numbers = [math.nan] * (_TOLD_NUMBERS * learners) if told is None else chain.from_iterable(told)
        own = record + _details(learners).pack(*numbers, bytes(row in sick for row in range(learners)))
    if isinstance(scope, Neighbours):  # they exchange no small arrays in their messages
        gathered: bytes | bytearray = _gather_from_neighbours(own, scope, topology)
    else:
        if topology.room_bytes:
            own += (b"" if packed is None else packed.tobytes()).ljust(topology.room_bytes, b"\0")
        gathered = _gather_from_all(own, topology.comm(scope), asleep)
    num_ranks = len(gathered) // len(own)
    # Nearly always all records are equal, and often all messages.
    if not flags and (gathered == own * num_ranks or _records(gathered, num_ranks) == record * num_ranks):
        return Meeting(num_ranks * learners, (), False, (fingerprint,) * num_ranks, rate, gathered)
    members = _members(scope, topology)
    records = list(_RECORD.iter_unpack(_records(gathered, num_ranks)))
    calls = {member: _call_of(*record[:5]) for member, record in zip(members, records, strict=True)}
    if any(other != call for other in calls.values()):
        raise MismatchError({member: str(other or "another collective") for member, other in calls.items()})
    all_flags, fingerprints, rates = zip(*(record[5:] for record in records), strict=True)
    failed = [member for member, flags in zip(members, all_flags, strict=True) if flags & _FAILED]
    if failed:
        raise _error_of(failed, error, scope, topology)
    of_all = tuple(
        member * learners + row
        for member, message in zip(members, _by_rank(gathered, num_ranks), strict=True)
        for row, is_sick in enumerate(_details(learners).unpack_from(message, _RECORD.size)[-1])
        if is_sick
    )
    is_any_large = any(flags & _LARGE for flags in all_flags)
    return Meeting(num_ranks * learners, of_all, is_any_large, fingerprints, _mean_rate(rates), gathered)


def _by_rank(gathered: bytes | bytearray, num_ranks: int) -> Values:
    """Return the message of each rank, shape (ranks, bytes)."""
    return np.frombuffer(gathered, dtype=np.uint8).reshape(num_ranks, -1)


def _records(gathered: bytes | bytearray, num_ranks: int) -> bytes:
    """Return the records of all messages."""
    return _by_rank(gathered, num_ranks)[:, : _RECORD.size].tobytes()


def _gather_from_all(own: bytes, comm: MPI.Comm, asleep: bool) -> bytes | bytearray:
    """Return the messages of all ranks of `comm`, in the order of the ranks."""
    num_ranks = comm.Get_size()
    if num_ranks == 1:
        return own
    gathered = bytearray(len(own) * num_ranks)
    buffers = [own, MPI.BYTE], [gathered, MPI.BYTE]
    if asleep:
        complete_asleep(comm.Iallgather(*buffers), _POLL_S)
    else:
        comm.Allgather(*buffers)
    return gathered


def _gather_from_neighbours(own: bytes, scope: Neighbours, topology: Topology) -> bytes:
    """Return the messages of this rank and its neighbours, in the order of the ranks."""
    comm = topology.comm(scope)
    messages: dict[int, bytes | bytearray] = {topology.rank: own}
    requests = []
    for partner in topology.links(scope).partners:
        messages[partner] = message = bytearray(len(own))
        requests.append(comm.Irecv([message, MPI.BYTE], partner, _TAG))
        requests.append(comm.Isend([own, MPI.BYTE], partner, _TAG))
    MPI.Request.Waitall(requests)
    return b"".join(messages[rank] for rank in sorted(messages))


def _members(scope: Scope, topology: Topology) -> Sequence[int]:
    """Return the ranks in `learner_ranks` whose records this rank gathers, in the order of the records."""
    if isinstance(scope, Neighbours):
        return sorted({topology.rank, *topology.links(scope).partners})
    return topology.ranks_of(scope)


def _error_of(failed: Sequence[int], own: Exception | None, scope: Scope, topology: Topology) -> Exception:
    """Return the error to raise: that of the first learner that failed. On a graph, a learner knows its own only."""
    if not isinstance(scope, Neighbours):
        return next(filter(None, topology.comm(scope).allgather(own)))
    return own or RuntimeError(f"learner {failed[0]}, a neighbour on the graph, has failed")


class Caller:
    """Makes the calls of one averager. A call holds the step only if the rule keeps all learners at the same step.

    Parameters
    ----------
    rule : the averager's rule.
    topology : the learners.
    number : the averager's number on its topology, from 0.
    """

    def __init__(self, rule: Rule, topology: Topology, number: int) -> None:
        self._topology = topology
        self._number = number
        self._has_servers = rule.server is not None
        self._has_own_steps = rule.own_pace or self._has_servers

    def call(self, kind: Kind, progress: Progress) -> Call:
        """Return the call of a learner with this `progress`."""
        step = None if self._has_own_steps else progress.step
        return Call(kind, self._number, step, None if self._has_servers else progress.round)

    def meet(self, call: Call, scope: Scope = GLOBAL, **report: Any) -> Meeting:
        """Meet the learners of `scope` in `call`; see the function `meet`. Collective over the scope."""
        return meet(call, scope, self._topology, asleep=self._has_servers, **report)

    def meet_all(self, kind: Kind, progress: Progress, **report: Any) -> Meeting:
        """Meet all learners in a call that is no part of a mean. Collective over all learners."""
        call = self.call(kind, progress)
        return self._topology.run_collective(lambda: self.meet(call, **report), what=call)


def _call_of(mark: bytes, kind: int, averager: int, step: int, round_: int) -> Call | None:
    """Return the call of a record; None if this module did not write it."""
    if mark != _MARK or kind not in list(Kind):
        return None
    return Call(Kind(kind), averager, None if step < 0 else step, None if round_ < 0 else round_)


def _mean_rate(rates: Sequence[float]) -> float:
    """Return the mean of `rates`. If all are equal, it is their value, bit for bit."""
    return rates[0] if len(set(rates)) == 1 else sum(rates) / len(rates)
