"""What the ranks of a job have, and what a run needs, as plain values; `inspection` finds them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankInventory:
    """What one rank has.

    Attributes
    ----------
    node : the host's name.
    number : the rank.
    group : the rank's local group, that of its first learner; None for a server.
    num_learners : the learners that the rank holds.
    cores : the cores that the rank may run on.
    cores_given : how many of the node's cores the job was given; None if neither scheduler nor container says.
    numa_nodes : the NUMA nodes of the rank's cores.
    num_numa_nodes : how many NUMA nodes the node has.
    threads : torch threads.
    device : ``cpu``, or the GPU's name.
    gpu : the GPU's identity, the same in all processes; None on the CPU.
    gpu_index : the GPU's number in this process; None on the CPU.
    visible_gpus : the identities of all GPUs that the rank sees.
    num_gpu_files : how many GPUs the node has in /dev.
    free_shared_bytes : free bytes in /dev/shm.
    thread_level : the thread level of MPI.
    is_fault_tolerant : MPI was started with fault tolerance.
    versions : versions of what must be the same on all ranks, by name; only those that the rank has looked up.
    """

    node: str
    number: int
    group: int | None = 0
    num_learners: int = 1
    cores: frozenset[int] = frozenset({0})
    cores_given: int | None = None
    numa_nodes: tuple[int, ...] = (0,)
    num_numa_nodes: int = 1
    threads: int = 1
    device: str = "cpu"
    gpu: str | None = None
    gpu_index: int | None = None
    visible_gpus: frozenset[str] = frozenset()
    num_gpu_files: int = 0
    free_shared_bytes: int = 2**40
    thread_level: str = "multiple"
    is_fault_tolerant: bool = False
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunNeeds:
    """What a run needs of its ranks.

    Attributes
    ----------
    device : the option.
    on_failure : the option.
    model_bytes : the size of one learner's parameters and buffers; 0 if unknown.
    copies_per_rank : how many times that size each rank has in shared memory.
    copies_per_node : how many times that size each node has in shared memory besides.
    locked_file_system : the type of the output's file system if HDF5 will lock files there and may fail; else None.
    intended_learners : how many learners the options are meant for; None if they do not say.
    """

    device: str = "auto"
    on_failure: str = "abort"
    model_bytes: int = 0
    copies_per_rank: int = 1
    copies_per_node: int = 0
    locked_file_system: str | None = None
    intended_learners: int | None = None

    def shared_bytes(self, num_ranks: int) -> int:
        """Return the bytes of shared memory that a node with `num_ranks` ranks needs."""
        return self.model_bytes * (num_ranks * self.copies_per_rank + self.copies_per_node)


def by_node(ranks: Sequence[RankInventory]) -> dict[str, list[RankInventory]]:
    """Return the ranks on each node, in their order."""
    nodes: dict[str, list[RankInventory]] = {}
    for rank in ranks:
        nodes.setdefault(rank.node, []).append(rank)
    return nodes
