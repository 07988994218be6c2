"""The cores of a rank: how many it can keep busy, and on which NUMA nodes they lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from mpi4py import MPI

from hpcavg.distributed.job_environment import cores_given, threads_allowed


def num_threads(node: MPI.Comm) -> int:
    """Return the torch threads for this rank: its share of the node's cores, or fewer if the job script says so.

    Collective over `node`, the ranks of this node.
    """
    own = os.sched_getaffinity(0)
    share = share_of_cores(own, node.allgather(own), cores_of_job())
    return min(share, threads_allowed(os.environ) or share)


def share_of_cores(own: AbstractSet[int], of_all: Sequence[AbstractSet[int]], given: int | None) -> int:
    """Return how many cores a rank can keep busy; at least 1.

    Parameters
    ----------
    own : set of int
        The cores that the rank may run on. It shares them with all ranks that may run on any of them.
    of_all : sequence of sets of int
        The same of all ranks of the node, this one included.
    given : int or None
        How many cores the job was given. If the ranks may run on more than these, they share these evenly.

    Examples
    --------
    Four ranks that may run on all of 16 cores:

    >>> from hpcavg.machine.cores import share_of_cores
    >>> cores = set(range(16))
    >>> share_of_cores(cores, [cores] * 4, given=None)
    4
    """
    share = len(own) // sum(1 for cores in of_all if cores & own)
    if given is not None and given < len(frozenset().union(*of_all)):
        share = min(share, given // len(of_all))
    return max(1, share)


def cores_of_job() -> int | None:
    """Return how many of this node's cores the scheduler or container gives to the job; None if neither says."""
    given = (cores_given(os.environ, MPI.Get_processor_name()), cpu_quota())
    return min((number for number in given if number is not None), default=None)


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how many cores the control groups of this process may keep busy; None if they have no limit.

    All ranks in a container share its limit.

    Parameters
    ----------
    cgroups : Path
        The folder with the control groups.
    own : Path
        The file with the names of this process's groups.
    """
    quotas = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = cgroups / "cpu" if controllers else cgroups
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                quotas.append(_quota(folder))
                if folder == root:
                    break
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> int | None:
    """Return the cores of one control group, of version 2 or 1."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):
            quota_us, period_us = map(int, " ".join((folder / name).read_text() for name in names).split())
            if quota_us > 0:
                return max(1, quota_us // period_us)
    return None


def numa_nodes(folder: Path = Path("/sys/devices/system/node")) -> dict[int, frozenset[int]]:
    """Return the cores of every NUMA node that has some; empty if the machine does not say."""
    nodes = {}
    for path in folder.glob("node[0-9]*/cpulist"):
        with suppress(OSError, ValueError):
            cores = cores_of_list(path.read_text())
            if cores:
                nodes[int(path.parent.name.removeprefix("node"))] = cores
    return dict(sorted(nodes.items()))


def cores_of_list(text: str) -> frozenset[int]:
    """Return the cores of a list in Linux's form, such as ``0-3,8``. Raises `ValueError` for anything else."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def numa_nodes_of(cores: Collection[int], nodes: Mapping[int, Collection[int]]) -> tuple[int, ...]:
    """Return the NUMA nodes, out of `nodes`, that have any of the `cores`."""
    return tuple(number for number, members in nodes.items() if set(members) & set(cores))
