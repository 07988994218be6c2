"""The ways of an array between nodes, and the trial that finds the fastest one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hpcavg.errors import InputError

ALLREDUCE, CHUNKS = "allreduce", "chunks"

# Small chunks start and end the transfer early; a fast network needs larger ones. The smallest size is just below
# 64 KiB: above it, MPI over TCP uses a handshake, which waits behind data in the other direction.
CHUNK_BYTES = (60 * 1024, 240 * 1024, 960 * 1024)
# A piece is still in the cache when its mean comes back from the network.
_PIECE_BYTES = (2**20, 2**21, 2**22)
# A count of MPI is a 32-bit C integer.
_LARGEST_PIECE_BYTES = 2**30

# Below this size, one collective is always fastest: there is no trial.
TRIED_BYTES = 256 * 1024
LARGEST_CLASS_BYTES = 2**26
"""Larger arrays take the way of this size."""
_ROUNDS = 4
# Later rounds leave out ways that took longer than this ratio to the fastest.
_HOPELESS = 1.3
# The first round warms up buffers and connections. Of a mean that takes longer, this is a small part.
_LONG_S = 0.02
# A trial of one way takes at least this long, in several means: shorter times are noise.
_SHORTEST_TRIAL_S = 0.001
_BUDGET_S = 2.0


@dataclass(frozen=True)
class Crossing:
    """The way of an array between nodes.

    Attributes
    ----------
    way : ``"allreduce"``: one MPI_Allreduce for each piece, summed in MPI's order, which is fixed for a size and a
        number of nodes. ``"chunks"``: many messages in flight, summed in the order of the nodes.
    num_lanes : number of lanes: ranks of each node that communicate with other nodes, each with its own slice.
    piece_bytes : size of a piece or chunk, in bytes. None: the whole slice in one piece.

    Examples
    --------
    >>> from hpcavg.engines.crossing import Crossing
    >>> str(Crossing("allreduce", 2, 2**21))
    'allreduce:2:2048'
    >>> Crossing.parse("chunks:1:60")
    Crossing(way='chunks', num_lanes=1, piece_bytes=61440)
    >>> Crossing.parse("allreduce:2").piece_bytes is None
    True
    """

    way: str
    num_lanes: int
    piece_bytes: int | None = None

    def __str__(self) -> str:
        size = "" if self.piece_bytes is None else f":{self.piece_bytes // 1024}"
        return f"{self.way}:{self.num_lanes}{size}"

    @classmethod
    def parse(cls, text: str) -> Crossing:
        """Return the crossing that `str` wrote as ``way:lanes:KiB`` or ``way:lanes``.

        Raises
        ------
        InputError
            If `text` is of another form.
        """
        way, *numbers = text.split(":")
        is_known = way in (ALLREDUCE, CHUNKS) and len(numbers) in (1, 2) and (way == ALLREDUCE or len(numbers) == 2)
        if not is_known or not all(number.isdecimal() and int(number) for number in numbers):
            raise InputError(
                "crossing", text, f"{ALLREDUCE}:LANES, {ALLREDUCE}:LANES:KIB or {CHUNKS}:LANES:KIB, from 1 up"
            )
        num_lanes, *sizes = map(int, numbers)
        return cls(way, num_lanes, sizes[0] * 1024 if sizes else None)

    def piece_elements(self, numel: int, itemsize: int) -> int:
        """Return the number of elements of a piece, at least 1.

        Parameters
        ----------
        numel : number of elements of the slice.
        itemsize : size of an element, in bytes.
        """
        limit_bytes = min(self.piece_bytes or _LARGEST_PIECE_BYTES, _LARGEST_PIECE_BYTES)
        return max(min(numel, limit_bytes // itemsize), 1)


def size_class(num_bytes: int, dtype: torch.dtype) -> str:
    """Return the name of the class of arrays that share a crossing: their dtype and the power of two of their size.

    Examples
    --------
    >>> from hpcavg.engines.crossing import size_class
    >>> size_class(44_700_000, torch.float32)
    'float32 up to 64 MiB'
    """
    exponent = min(max(num_bytes, 2) - 1, LARGEST_CLASS_BYTES - 1).bit_length()
    size = f"{2**exponent // 2**20} MiB" if exponent >= 20 else f"{max(2**exponent // 2**10, 1)} KiB"
    return f"{str(dtype).removeprefix('torch.')} up to {size}"


def candidates(num_bytes: int, num_lanes: int, largest_chunk_bytes: int, can_allreduce: bool) -> list[Crossing]:
    """Return the crossings to try. The same on all ranks.

    Parameters
    ----------
    num_bytes : size of the array.
    num_lanes : the maximum number of lanes.
    largest_chunk_bytes : the size of a chunk that memory allows.
    can_allreduce : whether MPI can sum the messages; it cannot if they are compressed.
    """
    found = []
    if can_allreduce:
        sizes = [size for size in _PIECE_BYTES if size < num_bytes // num_lanes]
        found += [Crossing(ALLREDUCE, num_lanes, size) for size in (None, *sizes)]
        if num_lanes > 1:
            found.append(Crossing(ALLREDUCE, 1))
    lanes = sorted({num_lanes, 1})
    chunks = [size for size in CHUNK_BYTES if size <= largest_chunk_bytes] or [largest_chunk_bytes]
    return found + [Crossing(CHUNKS, count, size) for count in lanes for size in chunks]


def trial(tried: list[Crossing], seconds: Callable[[Crossing, int], float]) -> dict[Crossing, float]:
    """Return the time of a mean for each crossing, in seconds. Collective.

    Parameters
    ----------
    tried : the crossings.
    seconds : ``seconds(crossing, repeats)`` returns the time of so many means on the slowest rank. The same on all
        ranks, so all of them come to the same result.

    Examples
    --------
    >>> from hpcavg.engines.crossing import Crossing, trial
    >>> slow, fast = Crossing("allreduce", 1), Crossing("allreduce", 2)
    >>> trial([slow, fast], lambda crossing, repeats: 0.01 * repeats / crossing.num_lanes)[fast]
    0.005
    """
    first = {crossing: seconds(crossing, 1) for crossing in tried}
    taken: dict[Crossing, list[float]] = {crossing: [] for crossing in tried}

    def medians() -> dict[Crossing, float]:
        return {crossing: statistics.median(times or [first[crossing]]) for crossing, times in taken.items()}

    spent_s = sum(first.values())
    for turn in range(_ROUNDS):
        known = medians()
        limit_s = _HOPELESS * min(known.values())
        for crossing in tried:
            is_hopeless = known[crossing] > limit_s and (turn > 0 or known[crossing] > _LONG_S)
            if is_hopeless or spent_s > _BUDGET_S:
                continue
            repeats = 1 + int(_SHORTEST_TRIAL_S / max(known[crossing], 1e-9))
            total_s = seconds(crossing, repeats)
            spent_s += total_s
            taken[crossing].append(total_s / repeats)
    return medians()


def fastest(seconds: Mapping[Crossing, float], way: str | None = None) -> Crossing:
    """Return the fastest crossing, or the fastest of one `way`."""
    return min((each for each in seconds if way in (None, each.way)), key=lambda each: seconds[each])
