"""Engines by name, and the best one for where the ranks and their parameters are."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import partial

import torch

from hpcavg.config.components import HOST_ENGINES
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.device_select import select_for_device

CPU = torch.device("cpu")


def _make(maker: str, topology: Topology, wire_format: WireFormat | None = None, **more: bool) -> Engine:
    """Return the engine of a class, whose module is imported now."""
    return pkgutil.resolve_name(maker)(topology, wire_format, **more)


ENGINES: dict[str, Callable[..., Engine]] = {name: partial(_make, entry.maker) for name, entry in HOST_ENGINES.items()}
"""What makes each engine for host memory."""


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
    if topology.num_learner_ranks == 1:
        engine, reason = ENGINES["mpi"](topology), "there is one learner, and nothing to send"
    elif topology.num_nodes == 1:
        reason = "all learners are on one node and share its memory"
        engine = ENGINES["shared"](topology, wire_format, is_required=False)
    else:
        reason = f"the ranks are on {topology.num_nodes} nodes and share the memory of each"
        engine = ENGINES["twolevel"](topology, wire_format, is_required=False)
    engine.notes.append(reason)
    return engine
