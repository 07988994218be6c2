"""The choice of an engine: by name, or the best one for the nodes and devices of the ranks."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hpcavg.config.components import DEVICE_ENGINES, HOST_ENGINES
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.crossing import Crossing
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine
from hpcavg.engines.gpu.cuda_support import find_cuda_awareness
from hpcavg.engines.gpu.nccl import NcclEngine, find_obstacle
from hpcavg.engines.staged import StagedEngine
from hpcavg.errors import InputError

CPU = torch.device("cpu")


def _make(maker: str, topology: Topology, wire_format: WireFormat | None = None, **more: Any) -> Engine:
    """Import the engine's class and return an engine."""
    return pkgutil.resolve_name(maker)(topology, wire_format, **more)


ENGINES: dict[str, Callable[..., Engine]] = {name: partial(_make, entry.maker) for name, entry in HOST_ENGINES.items()}
"""Functions that make the engines for host memory, by name."""


def select_engine(
    name: str,
    topology: Topology,
    device: torch.device = CPU,
    wire_format: WireFormat | None = None,
    crossing: str | None = None,
    takes_means: bool = True,
) -> Engine:
    """Return the engine with this name. Collective over all ranks.

    Parameters
    ----------
    name : a name, or ``"auto"`` for the best engine here.
    topology : the ranks.
    device : the device of the parameters.
    wire_format : the format of messages between nodes, unless a mean is exact. None sends values unchanged.
    crossing : the way of arrays between nodes; see `hpcavg.AveragingOptions`. None: by trial.
    takes_means : whether means are taken during the run, and their speed matters.

    Raises
    ------
    InputError
        On every rank, if the name is unknown or the engine cannot work here.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from hpcavg import Topology
    >>> select_engine("auto", Topology(MPI.COMM_SELF)).name
    'mpi'
    """
    if name in ("auto", *ENGINES) and device.type == "cpu":
        return _select_host_engine(name, topology, wire_format, crossing, takes_means)
    engine, choice = select_for_device(
        name,
        topology,
        device,
        lambda host: _select_host_engine(host, topology, wire_format, crossing, takes_means),
        compresses=wire_format is not None,
    )
    engine.notes.insert(0, choice.reason)
    return engine


def _select_host_engine(
    name: str, topology: Topology, wire_format: WireFormat | None, crossing: str | None, takes_means: bool
) -> Engine:
    """Return an engine for host memory."""
    way = {} if crossing is None else {"crossing": Crossing.parse(crossing)}
    if name == "twolevel":
        return ENGINES[name](topology, wire_format, **way)
    if name != "auto":
        return ENGINES[name](topology, wire_format)
    if topology.num_learner_ranks == 1:
        engine, reason = ENGINES["mpi"](topology), "one rank holds all learners, and there is nothing to send"
    elif not takes_means:
        engine, reason = ENGINES["mpi"](topology), "the algorithm takes no means before the end"
    elif topology.num_nodes == 1:
        reason = "all learners are on one node and share its memory"
        engine = ENGINES["shared"](topology, wire_format, is_required=False)
    else:
        reason = f"the ranks are on {topology.num_nodes} nodes and share the memory of each"
        engine = ENGINES["twolevel"](topology, wire_format, is_required=False, **way)
    engine.notes.append(reason)
    return engine


# -- devices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the choice depends on; the same on all ranks.

    Attributes
    ----------
    device : type of the parameters' device, cpu or cuda.
    num_ranks : number of ranks with learners.
    is_cuda_aware : whether MPI accepts device memory.
    how_known : the source of `is_cuda_aware`.
    nccl_obstacle : why ranks cannot average with NCCL; None if they can.
    compresses : whether messages between nodes are to be compressed.
    """

    device: str
    num_ranks: int = 1
    is_cuda_aware: bool = False
    how_known: str = "not asked"
    nccl_obstacle: str | None = None
    compresses: bool = False


@dataclass(frozen=True)
class Choice:
    """The chosen engine.

    Attributes
    ----------
    engine : its name.
    host : name of the engine for host memory. If the parameters are in host memory, it is the same as `engine`.
    reason : the reason, in one sentence.
    """

    engine: str
    host: str
    reason: str


def select_for_device(
    requested: str,
    topology: Topology,
    device: torch.device,
    make_host_engine: Callable[[str], Engine],
    cuda: Cuda | None = None,
    compresses: bool = False,
) -> tuple[Engine, Choice]:
    """Return the engine for arrays on `device` and the reason for the choice. Collective over all ranks.

    Parameters
    ----------
    requested : ``"auto"`` or a name.
    topology : the ranks.
    device : the device of the parameters.
    make_host_engine : returns the engine for host memory with a name, also for ``"auto"``.
    cuda : the calls to CUDA; None for the real ones.
    compresses : whether messages between nodes are to be compressed.

    Raises
    ------
    InputError
        On every rank, if the name is unknown or the engine cannot work here.
    """
    choice = choose_engine(requested, replace(find_facts(requested, topology, device, cuda), compresses=compresses))
    if choice.engine == "nccl":
        return NcclEngine(topology, device), choice
    if choice.engine == "cuda-aware":
        return CudaAwareEngine(topology, cuda=cuda), choice
    host = make_host_engine(choice.host)
    if choice.engine == choice.host:
        return host, choice
    return StagedEngine(topology, host, cuda), choice


def find_facts(requested: str, topology: Topology, device: torch.device, cuda: Cuda | None = None) -> Facts:
    """Return the facts for `device`. Only what matters for `requested` is tried. Collective over all ranks.

    Raises `InputError` on every rank if the ranks have different types of devices.
    """
    types = topology.all_ranks.allgather(device.type)
    if len(set(types)) > 1:
        given = f"{types[0]} on rank 0 and not on rank {next(r for r, other in enumerate(types) if other != types[0])}"
        raise InputError("device", given, "of one kind on all ranks, cpu or cuda")
    if device.type != "cuda":
        return Facts(device.type)
    if topology.survives:
        what = "does not survive the death of a rank"
        return Facts(device.type, topology.num_learner_ranks, False, f"device memory in MPI {what}", f"NCCL {what}")
    is_cuda_aware, how_known = find_cuda_awareness(topology)
    nccl_obstacle = find_obstacle(topology, device, cuda) if requested in ("auto", "nccl") else "not tried"
    return Facts(device.type, topology.num_learner_ranks, is_cuda_aware, how_known, nccl_obstacle)


def choose_engine(requested: str, facts: Facts) -> Choice:
    """Return the engine for `requested`, ``"auto"`` or a name.

    Raises `InputError` if the name is unknown or the engine cannot work here.

    Examples
    --------
    >>> choose_engine("auto", Facts("cuda", num_ranks=4)).engine
    'nccl'
    """
    if requested not in ("auto", *HOST_ENGINES, *DEVICE_ENGINES):
        raise InputError("engine", requested, f"one of {', '.join(('auto', *HOST_ENGINES, *DEVICE_ENGINES))}")
    if facts.device != "cuda":
        if requested in DEVICE_ENGINES:
            allowed = f"one of {', '.join(('auto', *HOST_ENGINES))} for parameters on {facts.device}"
            raise InputError("engine", requested, allowed)
        return Choice(requested, requested, f"the parameters are on {facts.device}")
    if requested in HOST_ENGINES:
        return Choice("staged", requested, f"{requested} was asked for, which works in host memory")
    if requested == "auto":
        return _choose_for_cuda(facts)
    if requested == "cuda-aware" and not facts.is_cuda_aware:
        allowed = f"staged or auto: {facts.how_known} (HPCAVG_CUDA_AWARE=1 if MPI takes device memory all the same)"
        raise InputError("engine", requested, allowed)
    if requested == "nccl" and facts.nccl_obstacle is not None:
        raise InputError("engine", requested, f"staged or auto: {facts.nccl_obstacle}")
    return Choice(requested, "auto", "it was asked for")


def _choose_for_cuda(facts: Facts) -> Choice:
    """Return the best engine for device memory."""
    if facts.num_ranks == 1:
        return Choice("staged", "auto", "there is one learner, and nothing to send")
    if facts.compresses:
        return Choice("staged", "auto", "messages are compressed, which takes host memory")
    if facts.nccl_obstacle is None:
        return Choice("nccl", "auto", "this torch has NCCL, and every rank has a GPU of its own")
    if facts.is_cuda_aware:
        return Choice("cuda-aware", "auto", f"{facts.nccl_obstacle}; MPI takes device memory ({facts.how_known})")
    return Choice("staged", "auto", f"{facts.nccl_obstacle}; MPI takes host memory only ({facts.how_known})")
