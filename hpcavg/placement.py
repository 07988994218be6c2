"""Where a rank computes: its share of the node's cores, and its device."""

from __future__ import annotations

import os
import time

import torch
from mpi4py import MPI

from hpcavg.errors import InputError
from hpcavg.launcher import started_ticks


def num_threads(node: MPI.Comm) -> int:
    """Return the torch threads for this rank: its cores, shared evenly with the ranks of the node that run on them too.

    Collective over `node`.
    """
    own = os.sched_getaffinity(0)
    sharing = sum(1 for cores in node.allgather(own) if cores & own)
    return max(1, len(own) // sharing)


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


def process_age_s() -> float:
    """Return the seconds since this process was started, interpreter and imports included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
