"""Where a rank computes: its share of the node's cores, and its device."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

import torch
from mpi4py import MPI

from hpcavg.distributed.job_environment import cores_given, started_ticks, threads_allowed
from hpcavg.errors import InputError


def num_threads(node: MPI.Comm) -> int:
    """Return the torch threads for this rank: its share of the node's cores, or what the job script allows if less.

    The share is of the cores that the rank may run on and that the job was given. Collective over `node`.
    """
    own = os.sched_getaffinity(0)
    share = share_of_cores(own, node.allgather(own), cores_of_job())
    return min(share, threads_allowed(os.environ) or share)


def share_of_cores(own: AbstractSet[int], of_all: Sequence[AbstractSet[int]], given: int | None) -> int:
    """Return how many cores a rank can keep busy.

    own : the cores that it may run on; ranks that may run on any of them have as many. of_all : those of all ranks of
    the node, its own included. given : how many the job was given; ranks that see more share these evenly.
    """
    share = len(own) // sum(1 for cores in of_all if cores & own)
    if given is not None and given < len(frozenset().union(*of_all)):
        share = min(share, given // len(of_all))
    return max(1, share)


def cores_of_job() -> int | None:
    """Return how many of this node's cores the job was given, by scheduler or container; None where none says."""
    given = (cores_given(os.environ, MPI.Get_processor_name()), cpu_quota())
    return min((number for number in given if number is not None), default=None)


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how many cores this process's control group, and those around it, may keep busy; None where no limit is.

    That of a container holds for all of its ranks together. cgroups : where the groups are mounted. own : the file that
    names those of this process.
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
    """Return the cores of every NUMA node of this machine that has some; nothing where it does not tell."""
    nodes = {}
    for path in folder.glob("node[0-9]*/cpulist"):
        with suppress(OSError, ValueError):
            cores = cores_of_list(path.read_text())
            if cores:
                nodes[int(path.parent.name.removeprefix("node"))] = cores
    return dict(sorted(nodes.items()))


def cores_of_list(text: str) -> frozenset[int]:
    """Return the cores of a list as Linux writes them, such as ``0-3,8``. Raises ValueError for anything else."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def numa_nodes_of(cores: Collection[int], nodes: Mapping[int, Collection[int]]) -> tuple[int, ...]:
    """Return the NUMA nodes, of `nodes`, on which any of the `cores` lie."""
    return tuple(number for number, members in nodes.items() if set(members) & set(cores))


def choose_device(name: str, node_rank: int) -> torch.device:
    """Return the device called `name`; ``auto`` is a GPU where there is one. Ranks of a node take turns on its GPUs."""
    num_gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cuda" and num_gpus == 0:
        raise InputError("device", name, "auto or cpu: no CUDA device is visible")
    if num_gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", node_rank % num_gpus)
    torch.cuda.set_device(device)
    return device


def gpu_identity(index: int) -> str:
    """Return what tells a visible GPU from all others of its node, whatever its number is in other processes."""
    properties = torch.cuda.get_device_properties(index)
    return str(getattr(properties, "uuid", None) or getattr(properties, "pci_bus_id", index))


def process_age_s() -> float:
    """Return the seconds since this process was started, interpreter and imports included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
