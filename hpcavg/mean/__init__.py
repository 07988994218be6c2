"""WHO: engines that take means over the learners of a scope, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.mean.compression import WIRE_DTYPES, WireFormat, wire_format
from hpcavg.mean.mpi import MpiEngine
from hpcavg.mean.pending import Arrived, Pending
from hpcavg.mean.shared import SharedEngine
from hpcavg.mean.twolevel import TwoLevelEngine
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

__all__ = ["ENGINES", "WIRE_DTYPES", "Arrived", "Engine", "Pending", "WireFormat", "select", "wire_format"]


class Engine(Protocol):
    """Takes means over the learners of a scope."""

    name: str
    notes: list[str]  # why this engine, and what trials showed

    def home(self, array: Tensor) -> Tensor:
        """Return where an array that is to be averaged should live: itself, or memory of the same form.

        array : shape (learners, numel), the same on all ranks. What it holds is the caller's to copy. Collective over
        all learners.
        """

    def mean(self, rows: Tensor, out: Tensor, scope: Scope, wire_format: WireFormat | None = None) -> None:
        """Write the mean over all learners in `scope` to `out`.

        rows : shape (learners, numel), this rank's learners. out : shape (numel,), same dtype and device; for a single
        learner it may be ``rows[0]`` itself. wire_format : of what crosses nodes, for engines that have a say in it.
        Collective over the scope; every rank gets the same bits.
        """

    def start(self, arrays: Sequence[Tensor], scope: Scope, wire_format: WireFormat | None = None) -> Pending:
        """Start the mean of every one of `arrays` as they are now, and return at once.

        Each has shape (learners, numel) and may change while the mean is on its way. Collective over the scope.
        """


ENGINES: dict[str, Callable[[Topology], Engine]] = {
    "mpi": MpiEngine,
    "shared": SharedEngine,
    "twolevel": TwoLevelEngine,
}


def select(name: str, topology: Topology) -> Engine:
    """Return the engine called `name`; ``"auto"`` picks by where the learners are."""
    if name == "auto":
        if topology.num_learners == 1:
            return MpiEngine(topology)
        kind = SharedEngine if topology.num_nodes == 1 else TwoLevelEngine
        return kind(topology, is_required=False)
    if name not in ENGINES:
        raise InputError("engine", name, f"one of auto, {', '.join(ENGINES)}")
    return ENGINES[name](topology)
