"""Where the ranks of a job are and what they have there, as plain values: what `hpcavg info` shows and warns of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """What one rank has.

    Attributes
    ----------
    node, rank : the host's name and the rank. group : its local group; None for a server.
    cores : those it may run on. given : how many of the node's the job was given; None where nobody says.
    numa_nodes : those on which its cores lie. num_numa_nodes : how many the node has.
    threads : torch threads.
    device : cpu, or the GPU's name. gpu, gpu_index : what tells the rank's GPU from others, and its number here.
    visible_gpus : what tells those apart that the rank sees. num_gpu_files : how many GPUs the machine has, by /dev.
    shared_bytes : free in /dev/shm.
    thread_level : of MPI. is_fault_tolerant : MPI was started with fault tolerance.
    versions : of what must be alike on all ranks, by name; only names that the rank has looked up.
    """

    node: str
    rank: int
    group: int | None = 0
    cores: frozenset[int] = frozenset({0})
    given: int | None = None
    numa_nodes: tuple[int, ...] = (0,)
    num_numa_nodes: int = 1
    threads: int = 1
    device: str = "cpu"
    gpu: str | None = None
    gpu_index: int | None = None
    visible_gpus: frozenset[str] = frozenset()
    num_gpu_files: int = 0
    shared_bytes: int = 2**40
    thread_level: str = "multiple"
    is_fault_tolerant: bool = False
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a run wants of its ranks' places.

    Attributes
    ----------
    device, on_failure : the options. num_bytes : of one learner's parameters and buffers; 0 where nobody knows.
    rows_per_rank, rows_per_node : how many times as much the ranks of a node share.
    locked_file_system : the type of the output's file system, where HDF5 will lock files and may fail to.
    intended_learners : how many learners the options are meant for; None where nobody says.
    """

    device: str = "auto"
    on_failure: str = "abort"
    num_bytes: int = 0
    rows_per_rank: int = 1
    rows_per_node: int = 0
    locked_file_system: str | None = None
    intended_learners: int | None = None

    def shared_bytes(self, num_ranks: int) -> int:
        """Return what `num_ranks` on a node share."""
        return self.num_bytes * (num_ranks * self.rows_per_rank + self.rows_per_node)


def by_node(places: Sequence[Place]) -> dict[str, list[Place]]:
    """Return the places on each node, in their order."""
    nodes: dict[str, list[Place]] = {}
    for place in places:
        nodes.setdefault(place.node, []).append(place)
    return nodes
