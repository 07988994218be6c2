"""Engines for where the parameters are: finds the facts, chooses, and builds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.engines.choice import Choice, Facts, choose_engine
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine
from hpcavg.engines.gpu.cuda_ipc import CudaIpcEngine, find_obstacle
from hpcavg.engines.gpu.cuda_support import find_cuda_awareness
from hpcavg.engines.staged import StagedEngine
from hpcavg.errors import InputError


def select_for_device(
    requested: str,
    topology: Topology,
    device: torch.device,
    host_engines: Sequence[str],
    make_host_engine: Callable[[str], Engine],
    cuda: Cuda | None = None,
) -> tuple[Engine, Choice]:
    """Return the engine for arrays on `device`, and why it is that one. Collective over all ranks.

    requested : ``"auto"`` or a name. host_engines : names of engines for host memory; make_host_engine : makes one of
    them, also ``"auto"``. Raises `InputError` on every rank for what is unknown or cannot be had here.
    """
    choice = choose_engine(requested, find_facts(requested, topology, device, cuda), host_engines)
    if choice.warning is not None and topology.rank == 0:
        warnings.warn(choice.warning, stacklevel=2)
    if choice.engine == "cuda-aware":
        return CudaAwareEngine(topology, cuda=cuda), choice
    host = make_host_engine(choice.host)
    if choice.engine == choice.host:
        return host, choice
    staged = StagedEngine(topology, host, cuda)
    return (CudaIpcEngine(topology, staged, cuda) if choice.engine == "cuda-ipc" else staged), choice


def find_facts(requested: str, topology: Topology, device: torch.device, cuda: Cuda | None = None) -> Facts:
    """Return what the choice for `device` rests on; only what matters for `requested` is tried. Collective."""
    kinds = topology.all_ranks.allgather(device.type)
    if len(set(kinds)) > 1:
        given = f"{kinds[0]} on rank 0 and not on rank {next(r for r, kind in enumerate(kinds) if kind != kinds[0])}"
        raise InputError("device", given, "of one kind on all ranks, cpu or cuda")
    if device.type != "cuda":
        return Facts(device.type)
    if topology.survives:
        reason = "what device memory is given to MPI or other ranks does not survive the death of one"
        return Facts(device.type, topology.num_learner_ranks, topology.num_nodes, False, reason, reason)
    is_cuda_aware, how_known = find_cuda_awareness(topology)
    obstacle = find_obstacle(topology, device, cuda) if requested in ("auto", "cuda-ipc") else "not tried"
    return Facts(device.type, topology.num_learner_ranks, topology.num_nodes, is_cuda_aware, how_known, obstacle)
