"""Engines by name, and the best one for where the ranks and their parameters are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.device_select import select_for_device
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.shared import SharedEngine
from hpcavg.engines.twolevel import TwoLevelEngine

CPU = torch.device("cpu")

ENGINES: dict[str, Callable[[Topology, WireFormat | None], Engine]] = {
    "mpi": MpiEngine,
    "shared": SharedEngine,
    "twolevel": TwoLevelEngine,
}


def select_engine(
    name: str, topology: Topology, device: torch.device = CPU, wire_format: WireFormat | None = None
) -> Engine:
    """Return the engine of this name. Collective over all ranks.

    Parameters
    ----------
    name : a name, or ``"auto"`` for the best engine here.
    topology : the ranks.
    device : where the parameters are.
    wire_format : what crosses nodes as, unless a mean is exact; None: as it is.

    Raises
    ------
    InputError
        On every rank, if the name is unknown or the engine cannot work here.
    """
    if name in ("auto", *ENGINES) and device.type == "cpu":
        return _select_host_engine(name, topology, wire_format)
    engine, choice = select_for_device(
        name, topology, device, list(ENGINES), lambda host: _select_host_engine(host, topology, wire_format)
    )
    engine.notes.insert(0, choice.reason)
    return engine


def _select_host_engine(name: str, topology: Topology, wire_format: WireFormat | None) -> Engine:
    """Return an engine for host memory."""
    if name != "auto":
        return ENGINES[name](topology, wire_format)
    engine: Engine
    if topology.num_learner_ranks == 1:
        engine, reason = MpiEngine(topology), "there is one learner, and nothing to send"
    elif topology.num_nodes == 1:
        engine, reason = (
            SharedEngine(topology, wire_format, is_required=False),
            "all learners are on one node and share its memory",
        )
    else:
        reason = f"the ranks are on {topology.num_nodes} nodes and share the memory of each"
        engine = TwoLevelEngine(topology, wire_format, is_required=False)
    engine.notes.append(reason)
    return engine
