"""The time of a mean over the learners: our engines, MPI alone, PyTorch's averagers, and one copy as the floor.

    mpirun -np 4 python -m benchmarks.mean [--max-bytes 1e9] [--repeats 101] [--json FILE]

All average the same float32 parameters on the same ranks, in turns, so a slow spell of the machine affects all. The
figure is the slowest rank's time: the median over the repeats and its 95 % confidence interval. algbw is bytes over
time; busbw is 2 (P - 1)/P times that, what a ring would have to move. "auto over best" is the median of `hpcavg auto`
over that of the fastest of all others that average. With --device cuda the parameters are on GPUs, and only our engines
and the floor are timed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI

from benchmarks import common, torch_peers
from benchmarks.figures import AUTO, FLOOR, Figure, OverBest, auto_over_best, interval
from benchmarks.lanes import LaneAllreduce
from benchmarks.options import chosen, run
from hpcavg import InputError, Topology
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.config.components import DEVICE_ENGINES
from hpcavg.engines.base import Engine
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.select import CPU, ENGINES, select_engine
from hpcavg.errors import require_integer, require_number
from hpcavg.machine.devices import choose_device
from hpcavg.utils.text import counted

RESNET_18 = 44_700_000
SIZES = (*(2**exponent for exponent in range(10, 25, 2)), RESNET_18, 2**26, 2**28, 2**30)
REFERENCE, LANES = "MPI Allreduce", "lane Allreduce"
_OVERLAP = {True: "overlap", False: "apart", None: "too few repeats"}


def engine_of(name: str, topology: Topology, device: torch.device = CPU) -> Engine | None:
    """Return the engine called `name`; None if it cannot serve these ranks."""
    try:
        return topology.run_on_all_ranks(lambda: select_engine(name, topology, device))
    except InputError:
        return None


def contenders(
    topology: Topology, numel: int, names: Sequence[str], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name. Each takes one mean of `numel` elements per rank, all of them 1."""
    found: dict[str, Callable[[], object]] = {}
    values, target = torch.ones(numel, device=device), torch.ones(numel, device=device)
    found[FLOOR] = lambda: target.copy_(values)
    for name in ("auto", *ENGINES, *DEVICE_ENGINES):
        engine = engine_of(name, topology, device) if f"hpcavg {name}" in names else None
        if engine is not None:
            own = torch.ones(1, numel, device=device)
            rows = topology.run_on_all_ranks(functools.partial(engine.allocate, own))
            rows.fill_(1.0)
            if name == "auto" and engine.crossings:
                common.say(topology, f"hpcavg auto: {engine.notes[-1]}")
            found[f"hpcavg {name}"] = functools.partial(engine.mean, rows, rows[0], GLOBAL)
    if device.type == "cpu":
        found |= _others(topology, values, names)
    found = {name: call for name, call in found.items() if name in names}
    if device.type == "cpu":
        return found
    return {name: functools.partial(_to_the_end, call, device) for name, call in found.items()}


def _to_the_end(call: Callable[[], object], device: torch.device) -> None:
    call()
    Cuda().synchronize(device)


def _others(topology: Topology, values: torch.Tensor, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Return the means that are not hpcavg's, of `values` in host memory."""
    raw = values.numpy()

    def allreduce() -> None:
        topology.learner_ranks.Allreduce(MPI.IN_PLACE, raw)
        np.divide(raw, topology.num_learners, out=raw)

    found: dict[str, Callable[[], object]] = {REFERENCE: allreduce}
    if LANES in names and topology.num_nodes > 1:  # on one node there is nothing between nodes
        lanes = LaneAllreduce(topology, values.numel())
        lanes.row.fill(1.0)
        found[LANES] = lanes
    return {**found, **torch_peers.means(topology, values)}


def memory_needed(num_bytes: int, num_shared: int, ranks_on_node: int) -> int:
    """Return the bytes that a node needs: two arrays, a peer's copy, and a row and a mean for each of `num_shared`.

    Those are the engines and the lane Allreduce, which keep their own rows.
    """
    return (3 + 2 * num_shared) * num_bytes * ranks_on_node


def memory_free() -> int:
    """Return the free bytes of a node, less a fifth in reserve. Shared memory takes from the same."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    disk = os.statvfs("/dev/shm")
    return int(0.8 * min(int(fields["MemAvailable"].split()[0]) * 1024, disk.f_bavail * disk.f_frsize))


def wire_s(num_bytes: int, num_nodes: int, gbit_per_s: float) -> float:
    """Return the seconds that the wire needs: 2 (N - 1)/N of the bytes leave and enter each of N nodes."""
    return 2 * (num_nodes - 1) / num_nodes * num_bytes * 8 / (gbit_per_s * 1e9)


def main() -> None:
    """Measure every size and print a table for each on rank 0."""
    on_device = (FLOOR, AUTO, *(f"hpcavg {name}" for name in (*ENGINES, *DEVICE_ENGINES)))
    on_host = (FLOOR, AUTO, *(f"hpcavg {name}" for name in ENGINES), REFERENCE, LANES)
    on_host += ("gloo all_reduce", "torch periodic", "torch hierarchical", "accelerate LocalSGD")
    names = tuple(dict.fromkeys(on_host + on_device))
    parser = common.Parser(__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", help="sizes to measure [1024, 4096, ... 16 MB, 44.7 MB]")
    parser.add_argument("--max-bytes", type=float, default=RESNET_18, help="largest size of the sweep, up to 2^30")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"what is timed, of: {', '.join(names)} [all]")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--seconds", type=float, default=10, help="per size; later repeats are left out, except 3 [10]")
    parser.add_argument("--wire-gbit", type=float, help="bandwidth between nodes in Gbit/s, to show its limit")
    parser.add_argument("--interface", help="network interface for gloo [that of the node's name]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the parameters are [cpu]")
    options = parser.parse_args()
    require_integer("repeats", options.repeats, 1)
    for num_bytes in options.bytes or ():
        require_integer("bytes", num_bytes, 4)
    if options.wire_gbit is not None:
        require_number("wire_gbit", options.wire_gbit, lambda rate: rate > 0, "a positive number")
    timed = chosen("only", options.only, names if options.only else on_host if options.device == "cpu" else on_device)
    topology = common.start(options)
    num_shared = sum(name.startswith("hpcavg ") or name == LANES for name in timed)
    device = topology.run_on_all_ranks(lambda: choose_device(options.device, topology.node_rank))
    ranks_on_node = topology.all_ranks.allreduce(topology.node.Get_size(), MPI.MAX)
    results: dict[str, dict[str, list[float]]] = {}
    wire: dict[str, float] = {}
    over_best: dict[str, OverBest] = {}
    with torch_peers.gloo(topology, options.interface):
        for size in options.bytes or [size for size in SIZES if size <= options.max_bytes]:
            numel = size // 4
            needed = memory_needed(4 * numel, num_shared, ranks_on_node)
            free = topology.all_ranks.allreduce(memory_free(), MPI.MIN)
            if needed > free:
                reason = f"a node needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB"
                common.say(topology, f"# mean of {4 * numel} bytes left out: {reason}; --only takes fewer at a time\n")
                continue
            calls = contenders(topology, numel, timed, device)
            if not calls:
                raise InputError("only", ", ".join(timed), f"what can run on {counted(topology.num_nodes, 'node')}")
            seconds = common.in_turns(topology.learner_ranks, calls, options.repeats, options.seconds)
            results[str(4 * numel)] = seconds
            if options.wire_gbit and topology.num_nodes > 1:
                wire[str(4 * numel)] = wire_s(4 * numel, topology.num_nodes, options.wire_gbit)
            _show(topology, 4 * numel, seconds, wire.get(str(4 * numel)))
            compared = auto_over_best({name: Figure(tuple(values), "s", "less") for name, values in seconds.items()})
            if compared is not None:
                over_best[str(4 * numel)] = compared
                common.say(topology, f"{over_best_line(compared)}\n")
            del calls  # before the next size's memory is taken
    if over_best:
        _show_over_best(topology, over_best)
    by_size = {size: compared._asdict() for size, compared in over_best.items()}
    common.report(topology, options, {"seconds": results, "wire_s": wire, "auto_over_best": by_size})


def _show(topology: Topology, num_bytes: int, seconds: dict[str, list[float]], wire: float | None) -> None:
    medians = {name: interval(values)[0] for name, values in seconds.items()}
    learners = topology.num_learners
    limits = {f"/ {FLOOR}": medians.get(FLOOR)}
    if wire is not None:
        limits["/ wire"] = wire
    rows = []
    for name, values in seconds.items():
        algbw = num_bytes / medians[name] / 1e9
        row = [name, *common.in_ms(values), f"{algbw:.3g}", f"{algbw * 2 * (learners - 1) / learners:.3g}"]
        row.append(f"{medians[REFERENCE] / medians[name]:.2f}" if REFERENCE in medians else "-")
        row += ["-" if limit is None else f"{medians[name] / limit:.2f}" for limit in limits.values()]
        rows.append(row)
    repeats = len(next(iter(seconds.values())))
    title = f"mean of {num_bytes} bytes over {_where(topology)}, {repeats} repeats"
    heads = ("", "median ms", "95 % interval", "algbw GB/s", "busbw GB/s", "x Allreduce", *limits)
    common.show(topology, title, heads, rows)


def over_best_line(found: OverBest) -> str:
    """Return a line on auto and the best of one size."""
    extra = f"{found.extra_s * 1e6:+.1f} us over {found.best}"
    return f"auto over best: {found.ratio:.3f} ({extra}; 95 % intervals: {_OVERLAP[found.overlap]})"


def _show_over_best(topology: Topology, over_best: dict[str, OverBest]) -> None:
    heads = ("bytes", "auto ms", "best", "best ms", "auto/best", "extra us", "95 % intervals")
    rows = []
    for size, found in over_best.items():
        auto, best = (f"{seconds * 1e3:.3f}" for seconds in (found.auto_s, found.best_s))
        extra = f"{found.extra_s * 1e6:+.1f}"
        rows.append([size, auto, found.best, best, f"{found.ratio:.3f}", extra, _OVERLAP[found.overlap]])
    common.show(topology, f"auto over best, means over {_where(topology)}", heads, rows)


def _where(topology: Topology) -> str:
    return f"{counted(topology.num_learners, 'rank')} on {counted(topology.num_nodes, 'node')}"


if __name__ == "__main__":
    run(main)
