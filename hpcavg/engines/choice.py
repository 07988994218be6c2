"""Which engine takes the means: a pure function of what was asked for and what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcavg.config.components import DEVICE_ENGINES
from hpcavg.errors import InputError


@dataclass(frozen=True)
class Facts:
    """What the choice rests on; the same on all ranks.

    Attributes
    ----------
    device : type of the device that the parameters are on, cpu or cuda.
    num_ranks : number of ranks with learners.
    num_nodes : number of nodes.
    is_cuda_aware : whether MPI takes device memory.
    how_known : how that is known.
    ipc_obstacle : why ranks cannot read each other's device memory; None if they can.
    """

    device: str
    num_ranks: int = 1
    num_nodes: int = 1
    is_cuda_aware: bool = False
    how_known: str = "not asked"
    ipc_obstacle: str | None = None


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen.

    Attributes
    ----------
    engine : its name.
    host : name of the engine for host memory; the same if the arrays live there.
    reason : why, in one sentence.
    warning : a warning for the user, or None.
    """

    engine: str
    host: str
    reason: str
    warning: str | None = None


def choose_engine(requested: str, facts: Facts, host_engines: Sequence[str]) -> Choice:
    """Return the engine for what was `requested`, ``"auto"`` or a name.

    host_engines : names of the engines for host memory, which with device arrays are what `staged` hands them to.
    Raises `InputError` for names that are unknown or cannot be had here.
    """
    if requested not in ("auto", *host_engines, *DEVICE_ENGINES):
        raise InputError("engine", requested, f"one of {', '.join(('auto', *host_engines, *DEVICE_ENGINES))}")
    if facts.device != "cuda":
        if requested in DEVICE_ENGINES:
            allowed = f"one of {', '.join(('auto', *host_engines))} for parameters on {facts.device}"
            raise InputError("engine", requested, allowed)
        return Choice(requested, requested, f"the parameters are on {facts.device}")
    if requested in host_engines:
        return Choice("staged", requested, f"{requested} was asked for, which works in host memory")
    if requested == "auto":
        return _choose(facts)
    if requested == "cuda-aware" and not facts.is_cuda_aware:
        allowed = f"staged or auto: {facts.how_known} (HPCAVG_CUDA_AWARE=1 if MPI takes device memory all the same)"
        raise InputError("engine", requested, allowed)
    if requested == "cuda-ipc" and facts.ipc_obstacle is not None:
        raise InputError("engine", requested, f"staged or auto: {facts.ipc_obstacle}")
    return Choice(requested, "auto", "it was asked for")


def _choose(facts: Facts) -> Choice:
    """Return the best engine for device arrays."""
    if facts.num_ranks == 1:
        return Choice("staged", "auto", "there is one learner, and nothing to send")
    if facts.num_nodes == 1 and facts.ipc_obstacle is None:
        return Choice("cuda-ipc", "auto", "all ranks are on one node and read each other's device memory")
    if facts.num_nodes == 1:
        reason = f"ranks cannot read each other's device memory: {facts.ipc_obstacle}"
        return Choice("staged", "auto", reason, warning=f"{reason}; means go through host memory")
    where = f"the ranks are on {facts.num_nodes} nodes"
    if facts.is_cuda_aware:
        return Choice("cuda-aware", "auto", f"{where}, and MPI takes device memory ({facts.how_known})")
    return Choice("staged", "auto", f"{where}, and MPI takes host memory only ({facts.how_known})")
