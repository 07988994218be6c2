"""The Python of a mean between nodes: what it takes where neither the wire nor memory costs anything.

    python -m benchmarks.stub_wire [--bytes 44700000] [--nodes 64] [--ranks-per-node 1] [--json FILE]

A stub takes the place of the communicator between nodes; its MPI_Allreduce returns at once. Array and pieces have
1/1024 of their size, so their number is the real one, and everything is in the cache. What is left is the time of
Python, of this rank in one mean. Crossings in chunks are left out: a trial chooses them on slow wires only.
"""

from __future__ import annotations

from unittest import mock

import numpy as np

from benchmarks import common
from benchmarks.mean import RESNET_18
from benchmarks.options import run
from hpcavg.engines import reduction
from hpcavg.engines.compression import Exact
from hpcavg.engines.crossing import ALLREDUCE, Crossing, candidates
from hpcavg.engines.pending import finish
from hpcavg.engines.reduction import slice_of
from hpcavg.engines.wire import Transfer, Wire, largest_chunk_bytes
from hpcavg.errors import require_integer

_SCALE = 1024


class StubLane:
    """A communicator of one rank of each node, whose sums arrive at once and change nothing."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def Get_rank(self) -> int:
        """Return 0: this rank is on the first node."""
        return 0

    def Get_size(self) -> int:
        """Return the number of nodes."""
        return self._num_nodes

    def Allreduce(self, sendbuf: object, recvbuf: object) -> None:
        """Do nothing."""


def small(crossing: Crossing) -> Crossing:
    """Return `crossing` with pieces of 1/1024 of their size."""
    size = crossing.piece_bytes
    return Crossing(crossing.way, crossing.num_lanes, None if size is None else max(size // _SCALE, 4))


def one_mean(crossing: Crossing, num_bytes: int, num_nodes: int, ranks_per_node: int) -> Transfer:
    """Return the transfer of this rank's slice, scaled down."""
    numel = num_bytes // 4 // _SCALE
    rows = [np.ones(numel, np.float32) for _ in range(ranks_per_node)]
    start, end = slice_of(numel, 0, crossing.num_lanes)
    code = Exact(np.dtype(np.float32))
    return Transfer(start, end, small(crossing), num_nodes * ranks_per_node, list(rows), list(rows), code)


def main() -> None:
    """Measure every crossing and print the table."""
    parser = common.Parser(__doc__)
    parser.add_argument("--bytes", type=int, default=RESNET_18, help="size of the array [44700000]")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--ranks-per-node", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=51)
    options = parser.parse_args()
    require_integer("bytes", options.bytes, 4 * _SCALE)
    for name in ("nodes", "ranks_per_node", "repeats"):
        require_integer(name, getattr(options, name), 1)
    topology = common.start(options)
    lane = Wire(StubLane(options.nodes))  # type: ignore[arg-type]  # it has what a wire calls
    tried = candidates(options.bytes, options.ranks_per_node, largest_chunk_bytes(options.nodes), can_allreduce=True)
    calls = {}
    for crossing in (each for each in tried if each.way == ALLREDUCE):
        transfer = one_mean(crossing, options.bytes, options.nodes, options.ranks_per_node)
        calls[str(crossing)] = lambda transfer=transfer: finish(lane.mean(transfer))
    with mock.patch.object(reduction, "PIECE_ELEMENTS", reduction.PIECE_ELEMENTS // _SCALE):
        seconds = common.in_turns(topology.learner_ranks, calls, options.repeats, budget_s=20)
    where = f"{options.bytes} bytes over {options.nodes} nodes of {options.ranks_per_node}"
    title = f"Python of a mean of {where}, a stub for the wire, {options.repeats} repeats"
    rows = [(name, *common.in_ms(values)) for name, values in seconds.items()]
    common.show(topology, title, ("crossing", "median ms", "95 % interval"), rows)
    common.report(topology, options, {"seconds": seconds})


if __name__ == "__main__":
    run(main)
