"""The identity of collectives: each learner says which one it is in, in the exchange that starts every mean.

Without it, a mean of one learner would pair with another call of the next: `finish` of one that ran out of data with
the mean of step 12 of the others, and both would go on with different models. All records have one size and travel in
one call of MPI, so whatever meets is compared before anything is merged.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from mpi4py import MPI

from hpcavg.errors import MismatchError
from hpcavg.schedule import Scope
from hpcavg.topology import Topology, complete_asleep

# What marks a record, so that a collective of the caller's own on the same communicator is not taken for one.
_MARK = b"avg1"
# Identity: mark, kind, number of the averager, step, round. What is told: flags, fingerprint, learning rate.
_IDENTITY = struct.Struct("<4sHHqq")
_TOLD = struct.Struct("<QQd")
_SIZE = _IDENTITY.size + _TOLD.size
_SICK, _LARGE, _FAILED = 1, 2, 4
_POLL_S = 0.0005


class Kind(IntEnum):
    """What a learner does together with others."""

    LOCAL_AVERAGE = 1
    GLOBAL_AVERAGE = 2
    FINISH = 3
    MEAN_MODEL = 4
    RECOMPUTE_BUFFERS = 5
    CHECK_HEALTH = 6
    RESET_ANCHOR = 7
    FIRST_STEP = 8


_AVERAGES = {Scope.LOCAL: Kind.LOCAL_AVERAGE, Scope.GLOBAL: Kind.GLOBAL_AVERAGE}


class Call(NamedTuple):
    """One collective call of an averager.

    Attributes
    ----------
    kind : what it is. averager : the averager's number on its topology, from 0.
    step, round : where the learner is; None where learners may differ in it.
    """

    kind: Kind
    averager: int
    step: int | None
    round: int | None

    @classmethod
    def average(cls, scope: Scope, averager: int, step: int | None, round_: int | None) -> Call:
        """Return the call that takes the mean over `scope`."""
        return cls(_AVERAGES[scope], averager, step, round_)

    def __str__(self) -> str:
        name = self.kind.name.lower()
        is_average = self.kind in _AVERAGES.values()
        text = name.replace("_", " ") if is_average or self.kind is Kind.FIRST_STEP else f"averager.{name}()"
        if self.step is not None:
            text += f" of step {self.step}" if is_average else f" after step {self.step}"
        elif self.round is not None:
            text += f" of round {self.round + 1}" if is_average else f" in round {self.round + 1}"
        return f"{text} (averager {self.averager + 1})" if self.averager else text

    def _pack(self) -> bytes:
        step, round_ = (-1 if number is None else number for number in (self.step, self.round))
        return _IDENTITY.pack(_MARK, self.kind, self.averager, step, round_)


def _unpack(record: bytes) -> Call | None:
    """Return the call in `record`; None where it is not one of this module's."""
    mark, kind, averager, *numbers = _IDENTITY.unpack_from(record)
    if mark != _MARK or kind not in list(Kind):
        return None
    step, round_ = (None if number < 0 else number for number in numbers)
    return Call(Kind(kind), averager, step, round_)


@dataclass(frozen=True)
class Meeting:
    """What the learners that are in one call told each other.

    Attributes
    ----------
    num_members : how many they are.
    sick : those with parameters that are not finite, as indices in the topology's `world`.
    is_large : some of them hold values so large that their sum may overflow.
    fingerprints : what each of them gave, to be compared. rate : the mean of their learning rates.
    """

    num_members: int
    sick: tuple[int, ...]
    is_large: bool
    fingerprints: Sequence[int]
    rate: float


def meet(
    call: Call,
    scope: Scope,
    topology: Topology,
    *,
    is_sick: bool = False,
    is_large: bool = False,
    fingerprint: int = 0,
    rate: float = 0.0,
    error: Exception | None = None,
    asleep: bool = False,
) -> Meeting:
    """Tell the learners of `scope` which call this is, and learn that all are in it. Collective over the scope.

    Parameters
    ----------
    call : what this learner does.
    scope, topology : the learners that take part.
    is_sick : this learner's parameters are not finite.
    is_large : this learner holds values whose sum over the learners may overflow.
    fingerprint : 64 bits of whatever the caller compares.
    rate : this learner's learning rate.
    error : what has gone wrong on this learner; it is raised on all of them.
    asleep : wait asleep, for learners that may come at very different times. The same on all of them.

    Raises `MismatchError` on all of them where they are in different calls.
    """
    comm = topology.comm(scope)
    num_members = comm.Get_size()
    flags = _SICK * is_sick | _LARGE * is_large | _FAILED * (error is not None)
    own = call._pack() + _TOLD.pack(flags, fingerprint, rate)
    told = own
    if num_members > 1:
        received = bytearray(_SIZE * num_members)
        buffers = [own, MPI.BYTE], [received, MPI.BYTE]
        if asleep:
            complete_asleep(comm.Iallgather(*buffers), _POLL_S)
        else:
            comm.Allgather(*buffers)
        told = bytes(received)
    if told == own * num_members and not flags:  # nearly always
        return Meeting(num_members, (), False, (fingerprint,) * num_members, rate)
    members = comm.Get_group().Translate_ranks(None, topology.world.Get_group())
    records = [told[start : start + _SIZE] for start in range(0, len(told), _SIZE)]
    calls = [_unpack(record) for record in records]
    if any(other != call for other in calls):
        raise MismatchError(
            {member: str(other or "another call") for member, other in zip(members, calls, strict=True)}
        )
    all_flags, fingerprints, rates = zip(
        *(_TOLD.unpack_from(record, _IDENTITY.size) for record in records), strict=True
    )
    if any(flags & _FAILED for flags in all_flags):
        raise next(filter(None, comm.allgather(error)))
    sick = tuple(member for member, flags in zip(members, all_flags, strict=True) if flags & _SICK)
    return Meeting(num_members, sick, any(flags & _LARGE for flags in all_flags), fingerprints, _mean_rate(rates))


def _mean_rate(rates: Sequence[float]) -> float:
    """Return the mean of `rates`; where all are equal, their value to the last bit."""
    return rates[0] if len(set(rates)) == 1 else sum(rates) / len(rates)
