"""Find out what this rank has, and what a run with given options needs."""

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
from torch.nn.modules.dropout import _DropoutNd

import hpcavg
from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.distributed import shrinking
from hpcavg.distributed.topology import Topology
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.machine import cores, mpi_library
from hpcavg.machine.inventory import RankInventory, RunNeeds, by_node
from hpcavg.machine.warnings import find_warnings
from hpcavg.utils.revision import git_revision

# File systems on which locks are slow, fail, or hang.
_NETWORK_FILE_SYSTEMS = ("lustre", "gpfs", "beegfs", "nfs", "nfs4", "pvfs2", "panfs", "wekafs", "cifs", "ceph")
_LOCKING = "HDF5_USE_FILE_LOCKING"
# How many warnings a run shows; `hpcavg info` shows all.
_MAX_WARNINGS = 3


def take_inventory(topology: Topology, device: torch.device, threads: int) -> RankInventory:
    """Return what this rank has.

    Parameters
    ----------
    topology : Topology
        The ranks of the job.
    device : torch.device
        The device that this rank computes on.
    threads : int
        The torch threads of this rank.
    """
    own_cores = frozenset(os.sched_getaffinity(0))
    numa_nodes = cores.numa_nodes()
    is_on_gpu = device.type == "cuda"
    visible = [Cuda().identity(index) for index in range(torch.cuda.device_count())] if is_on_gpu else []
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
    if topology.node_rank == 0:  # these take longer to look up
        versions |= {name: importlib.metadata.version(name) for name in ("mpi4py", "h5py")}
        revision = git_revision()
        versions |= {"revision": revision} if revision else {}  # a node without git is not a different one
    return RankInventory(
        node=MPI.Get_processor_name(),
        number=topology.rank,
        group=None if topology.is_server else topology.group,
        num_learners=len(topology.learners),
        cores=own_cores,
        cores_given=cores.cores_of_job(),
        numa_nodes=cores.numa_nodes_of(own_cores, numa_nodes),
        num_numa_nodes=len(numa_nodes),
        threads=threads,
        device=torch.cuda.get_device_name(device) if is_on_gpu else device.type,
        gpu=visible[device.index or 0] if is_on_gpu else None,
        gpu_index=device.index if is_on_gpu else None,
        visible_gpus=frozenset(visible),
        num_gpu_files=sum(1 for _ in Path("/dev").glob("nvidia[0-9]*")),
        free_shared_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        thread_level=mpi_library.thread_level(),
        is_fault_tolerant=shrinking.is_enabled(),
        versions=versions,
    )


def inspect_job(topology: Topology, config: Config, device: torch.device, threads: int) -> tuple[list[str], list[str]]:
    """Return the names of all nodes and the first few warnings, both on rank 0 and empty on other ranks.

    Collective over all ranks. The parameters are those of `take_inventory`, and `config`, the options of the run.
    """
    ranks = topology.all_ranks.gather(take_inventory(topology, device, threads)) or []
    texts = find_warnings(ranks, find_needs(config, topology.learners_per_rank))
    more = len(texts) - _MAX_WARNINGS
    rest = [f"{more} more: python -m hpcavg info"] if more > 0 else []
    return sorted(by_node(ranks)), [*texts[:_MAX_WARNINGS], *rest]


def find_needs(config: Config, learners_per_rank: int = 1, model_bytes: int = 0) -> RunNeeds:
    """Return what a run needs.

    Parameters
    ----------
    config : Config
        The options of the run.
    learners_per_rank : int
        The learners of each rank.
    model_bytes : int
        The size of the model; 0 if it is unknown or the shared memory for it is allocated already.
    """
    rule = config.rule()
    out_of_place = not rule.delay_steps and (rule.how.reads_parameters or config.faults.on_failure == "shrink")
    locks = os.environ.get(_LOCKING, "FALSE").upper() not in ("FALSE", "0")
    file_system = file_system_of(Path(config.run.output or "runs"))
    return RunNeeds(
        device=config.run.device,
        on_failure=config.faults.on_failure,
        model_bytes=model_bytes,
        copies_per_rank=learners_per_rank * (1 + int(rule.delay_steps > 0) + int(rule.averages == "gradients")),
        copies_per_node=2 * int(out_of_place),  # of the local and of the global mean
        locked_file_system=file_system if locks and file_system in _NETWORK_FILE_SYSTEMS else None,
        intended_learners=config.run.intended_learners,
    )


def build_without_memory(config: Config) -> torch.nn.Module:
    """Return a learner's model, on torch's meta device.

    Raises
    ------
    InputError
        The task cannot build a model that way.
    """
    task = tasks.load(config)
    with torch.device("meta"):
        return tasks.build_model(task)


def has_random_layers(model: torch.nn.Module) -> bool:
    """Return whether the model has dropout. Other random operations are not found."""
    return any(getattr(layer, "p", 0) for layer in model.modules() if isinstance(layer, _DropoutNd))


def model_bytes(config: Config, model: torch.nn.Module) -> int:
    """Return the size of what a learner averages of `model`."""
    averaged = (
        *(parameter for parameter in model.parameters() if parameter.requires_grad),
        *(buffer for buffer in model.buffers() if buffer.is_floating_point()),
    )
    return sum(tensor.numel() for tensor in averaged) * getattr(torch, config.run.dtype).itemsize


def file_system_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the type of the file system of `path`, which need not exist; None if it is not known.

    Parameters
    ----------
    path : Path
        A file or folder.
    mounts : Path
        The file that lists the file systems.
    """
    path = path.resolve()
    found: dict[int, str] = {}
    with suppress(OSError):
        for line in mounts.read_text().splitlines():
            _, folder, kind, *_ = line.split()
            if path.is_relative_to(folder):
                found[len(Path(folder).parts)] = kind  # the last of several at one place hides the others
    return found[max(found)] if found else None
