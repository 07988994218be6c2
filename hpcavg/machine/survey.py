"""Looks at where this rank is and what it has there; `hpcavg.machine.place` says what that is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

import hpcavg
from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.distributed import shrinking
from hpcavg.distributed.topology import Topology
from hpcavg.machine import mpi_library, placement
from hpcavg.machine.advice import warnings
from hpcavg.machine.place import Place, Plan, by_node
from hpcavg.utils.revision import git_revision

# Where locks are slow, fail, or hang.
_NETWORK_FILE_SYSTEMS = ("lustre", "gpfs", "beegfs", "nfs", "nfs4", "pvfs2", "panfs", "wekafs", "cifs", "ceph")
_LOCKING = "HDF5_USE_FILE_LOCKING"
# Of those of a run; `hpcavg info` tells all.
_MAX_WARNINGS = 3


def find_place(topology: Topology, device: torch.device, threads: int) -> Place:
    """Return where this rank is, with its `device` and torch `threads`."""
    cores = frozenset(os.sched_getaffinity(0))
    numa_nodes = placement.numa_nodes()
    is_on_gpu = device.type == "cuda"
    visible = [placement.gpu_identity(index) for index in range(torch.cuda.device_count())] if is_on_gpu else []
    ucx = mpi_library.ucx()
    versions = {
        "hpcavg": hpcavg.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "MPI": mpi_library.version(),
        "UCX": "none" if ucx is None else ucx[0],
        "messages by": mpi_library.messages_by(os.environ)[0] or "unknown",
    }
    if topology.node_rank == 0:  # what takes longer to look up, once on each node
        versions |= {name: importlib.metadata.version(name) for name in ("mpi4py", "h5py")}
        revision = git_revision()
        versions |= {"revision": revision} if revision else {}  # a node without git need not have another
    return Place(
        node=MPI.Get_processor_name(),
        rank=topology.rank,
        group=None if topology.is_server else topology.group,
        cores=cores,
        given=placement.cores_of_job(),
        numa_nodes=placement.numa_nodes_of(cores, numa_nodes),
        num_numa_nodes=len(numa_nodes),
        threads=threads,
        device=torch.cuda.get_device_name(device) if is_on_gpu else device.type,
        gpu=visible[device.index or 0] if is_on_gpu else None,
        gpu_index=device.index if is_on_gpu else None,
        visible_gpus=frozenset(visible),
        num_gpu_files=sum(1 for _ in Path("/dev").glob("nvidia[0-9]*")),
        shared_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        thread_level=mpi_library.thread_level(),
        is_fault_tolerant=shrinking.is_enabled(),
        versions=versions,
    )


def look_around(topology: Topology, config: Config, device: torch.device, threads: int) -> tuple[list[str], list[str]]:
    """Return the names of all nodes, and the first of what will hurt the run there; on rank 0, nothing on the others.

    Collective over all ranks.
    """
    places = topology.all_ranks.gather(find_place(topology, device, threads)) or []
    texts = warnings(places, find_plan(config))
    more = len(texts) - _MAX_WARNINGS
    rest = [f"{more} more: python -m hpcavg info"] if more > 0 else []
    return sorted(by_node(places)), [*texts[:_MAX_WARNINGS], *rest]


def find_plan(config: Config, num_bytes: int = 0) -> Plan:
    """Return what a run with these options wants. num_bytes : of its model, where that is not yet in its place."""
    rule = config.rule()
    out_of_place = not rule.delay_steps and (rule.how.reads_parameters or config.on_failure == "shrink")
    locks = os.environ.get(_LOCKING, "FALSE").upper() not in ("FALSE", "0")
    file_system = file_system_of(Path(config.output or "runs"))
    return Plan(
        device=config.device,
        on_failure=config.on_failure,
        num_bytes=num_bytes,
        rows_per_rank=1 + int(rule.delay_steps > 0) + int(rule.averages == "gradients"),
        rows_per_node=2 * int(out_of_place),  # of a local and of the global mean
        locked_file_system=file_system if locks and file_system in _NETWORK_FILE_SYSTEMS else None,
        intended_learners=config.intended_learners,
    )


def model_bytes(config: Config) -> int:
    """Return the size of what a learner brings into a mean, from a model built without memory.

    Raises `InputError` where the task gives no model so.
    """
    task = tasks.load(config)
    with torch.device("meta"):
        model = tasks.build_model(task)
    averaged = (
        *(parameter for parameter in model.parameters() if parameter.requires_grad),
        *(buffer for buffer in model.buffers() if buffer.is_floating_point()),
    )
    return sum(tensor.numel() for tensor in averaged) * getattr(torch, config.dtype).itemsize


def file_system_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the type of the file system that `path` is or would be on. mounts : the file that lists them."""
    path = path.resolve()
    found: dict[int, str] = {}
    with suppress(OSError):
        for line in mounts.read_text().splitlines():
            _, folder, kind, *_ = line.split()
            if path.is_relative_to(folder):
                found[len(Path(folder).parts)] = kind  # of several at one place, the last is what one sees
    return found[max(found)] if found else None
