"""WHO: engines that take means over the learners of a scope, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hpcavg.mean.choice import DEVICE_ENGINES
from hpcavg.mean.compression import WIRE_DTYPES, WireFormat, wire_format
from hpcavg.mean.devices import select_for_device
from hpcavg.mean.mpi import MpiEngine
from hpcavg.mean.pending import Arrived, CountWell, Pending
from hpcavg.mean.shared import SharedEngine
from hpcavg.mean.staged import OnItsWay
from hpcavg.mean.twolevel import TwoLevelEngine
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

CPU = torch.device("cpu")

__all__ = [
    "CPU",
    "DEVICE_ENGINES",
    "ENGINES",
    "WIRE_DTYPES",
    "Arrived",
    "Engine",
    "OnItsWay",
    "Pending",
    "WireFormat",
    "select",
    "take_means",
    "take_means_of_large",
    "wire_format",
]


class Engine(Protocol):
    """Takes means over the learners of a scope."""

    name: str
    notes: list[str]  # why this engine, and what trials showed
    compresses: bool  # what crosses nodes, if anything does, in the wire format that is asked for

    def home(self, array: Tensor) -> Tensor:
        """Return where an array that is to be averaged should live: itself, or memory of the same form.

        array : shape (learners, numel), the same on all ranks. What it holds is the caller's to copy. Collective over
        all learners.
        """

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        wire_format: WireFormat | None = None,
        num_well: int | None = None,
    ) -> None:
        """Write the mean over all learners in `scope` to `out`.

        rows : shape (learners, numel), this rank's learners. out : shape (numel,), same dtype and device; for a single
        learner it may be ``rows[0]`` itself. wire_format : of what crosses nodes, for engines that have a say in it.
        num_well : of how many ranks the mean is where it leaves out the others, whose rows are zero; None: of all.
        Nothing is compressed where ranks are left out. Collective over the scope; every rank gets the same bits.
        """

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        wire_format: WireFormat | None = None,
        count_well: CountWell | None = None,
    ) -> OnItsWay:
        """Start the mean of every one of `arrays` as they are now, and return at once.

        Each has shape (learners, numel) and may change while the mean is on its way. An engine has one on its way at a
        time. count_well : returns the `num_well` of all arrays but the first from the mean of that, which is over all
        and goes as it is. Collective over the scope, at the first call for these arrays over all learners.
        """


ENGINES: dict[str, Callable[[Topology], Engine]] = {
    "mpi": MpiEngine,
    "shared": SharedEngine,
    "twolevel": TwoLevelEngine,
}


def take_means(
    engine: Engine,
    arrays: Sequence[Tensor],
    scope: Scope,
    is_beside: bool = False,
    wire_format: WireFormat | None = None,
    num_well: int | None = None,
) -> list[Tensor]:
    """Return the mean of every one of `arrays` over `scope`; see `Engine.mean`. Collective over the scope.

    Unless it `is_beside`, the mean of a single learner's array takes its place: no copy, no second array.
    """
    means = []
    for array in arrays:
        mean = torch.empty_like(array[0]) if is_beside or array.shape[0] > 1 else array[0]
        engine.mean(array, mean, scope, wire_format, num_well)
        means.append(mean)
    return means


def take_means_of_large(
    engine: Engine, arrays: Sequence[Tensor], scope: Scope, num_members: int, num_well: int | None
) -> list[Tensor]:
    """Return the means of values whose sum may overflow: of copies divided by a power of two, which is exact.

    num_members : how many learners are in the scope. num_well : the divisor; see `Engine.mean`. Collective over the
    scope.
    """
    means = []
    for array in arrays:
        # Sums of float16 are taken in float32, and do not overflow.
        scale = 1.0 if array.dtype == torch.float16 else 2.0 ** -num_members.bit_length()
        (mean,) = take_means(engine, [array * scale], scope, num_well=num_well)
        means.append(mean.div_(scale))
    return means


def select(name: str, topology: Topology, device: torch.device = CPU) -> Engine:
    """Return the engine called `name`, or with ``"auto"`` the best one, for parameters on `device`.

    Collective over everyone. Raises `InputError` on every rank for what is unknown or cannot be had here.
    """
    if name in ("auto", *ENGINES) and device.type == "cpu":
        return _select_host_engine(name, topology)
    engine, choice = select_for_device(
        name, topology, device, list(ENGINES), lambda host: _select_host_engine(host, topology)
    )
    engine.notes.insert(0, choice.reason)
    return engine


def _select_host_engine(name: str, topology: Topology) -> Engine:
    """Return an engine for host memory."""
    if name != "auto":
        return ENGINES[name](topology)
    engine: Engine
    if topology.num_learners == 1:
        engine, reason = MpiEngine(topology), "there is one learner, and nothing to send"
    elif topology.num_nodes == 1:
        engine, reason = SharedEngine(topology, is_required=False), "all learners are on one node and share its memory"
    else:
        reason = f"the ranks are on {topology.num_nodes} nodes and share the memory of each"
        engine = TwoLevelEngine(topology, is_required=False)
    engine.notes.append(reason)
    return engine
