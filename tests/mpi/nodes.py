"""Ranks of one node, told that they are on several: shared memory inside each, MPI between them."""

import os
from pathlib import Path

from mpi4py import MPI

from hpcavg import Topology

# Node of every rank, by rank. The third puts one rank on the first node and up to four on the others.
LAYOUTS = {
    "one node": lambda rank: 0,
    "nodes of 2": lambda rank: rank // 2,
    "nodes of 1 and 4": lambda rank: (rank + 3) // 4,
    "nodes of 1": lambda rank: rank,
}
# What tests try. A cluster's real nodes divide the layouts further: "nodes of 2" of 2,2 ranks are the real ones. Of the
# network between nodes, two layouts show all: the real nodes, and more nodes than those, with unequal numbers of ranks.
_IS_CLUSTER = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_size() < MPI.COMM_WORLD.Get_size()
TRIED = ["one node", "nodes of 1 and 4"] if _IS_CLUSTER else [*LAYOUTS]


class Nodes(Topology):
    """A topology whose nodes are those of a layout."""

    def __init__(self, world, group_size, layout, learners_per_rank=1):
        self._node_index = LAYOUTS[layout](world.Get_rank())
        super().__init__(world, group_size, learners_per_rank=learners_per_rank)

    def split_by_node(self, comm):
        real = super().split_by_node(comm)  # on a cluster, nodes are divided further
        parts = real.Split(self._node_index, comm.Get_rank())
        real.Free()
        return parts


def shared_files(comm):
    """Return the names in /dev/shm that the ranks of `comm` have made; other jobs have theirs. Collective."""
    own = [path.name for path in Path("/dev/shm").glob(f"hpcavg-{os.getpid()}-*")]
    return [name for names in comm.allgather(own) for name in names]
