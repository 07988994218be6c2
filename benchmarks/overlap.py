"""The share of a mean that is hidden behind computation, which DaSGD relies on.

    mpirun -np 2 python -m benchmarks.overlap [--bytes 11000000] [--compute-ratio 1.3] [--repeats 9] [--json FILE]

The formula is that of the OSU benchmarks for non-blocking collectives:

    overlap % = 100 max(0, 1 - (t_total - t_compute) / t_pure)

t_pure: start a mean and wait for it. t_compute: training steps in torch, so many that they take about
`--compute-ratio` times t_pure. t_total: start, compute, wait. slower %: how much longer the computation takes beside a
mean than alone; a mean that takes the core hides nothing. The last row is the floor for TCP: every rank sends and
receives as many bytes and does nothing with them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from mpi4py import MPI

from benchmarks import common
from benchmarks.mean import engine_of
from benchmarks.options import run
from benchmarks.tcp import Ring
from benchmarks.workloads import mlp_workload
from hpcavg import Topology
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.engines.base import Engine
from hpcavg.engines.select import ENGINES
from hpcavg.errors import require_integer, require_number
from hpcavg.utils.text import counted

_PILOT_STEPS = 5
Start = Callable[[], Callable[[], object]]
"""Starts a mean of a copy of the parameters and returns a function that waits for it."""


def contenders(topology: Topology, numel: int, pool: ThreadPoolExecutor) -> dict[str, Start]:
    """Return functions that start a mean of `numel` elements per rank, all of them 1, by name."""
    found: dict[str, Start] = {}
    for name in ENGINES:
        engine = engine_of(name, topology)
        if engine is not None:
            rows = engine.allocate(torch.ones(1, numel))
            rows.fill_(1.0)
            found[f"hpcavg {name}"] = functools.partial(_start, engine, rows)
    values, total = np.ones(numel, np.float32), np.empty(numel, np.float32)
    comm = topology.learner_ranks.Dup()  # for the thread: two threads must not use one communicator

    def scaled(wait: Callable[[], object]) -> Callable[[], object]:
        def wait_and_scale() -> None:
            wait()
            np.divide(total, topology.num_learners, out=total)

        return wait_and_scale

    def iallreduce() -> Callable[[], object]:
        np.copyto(total, values)
        return scaled(comm.Iallreduce(MPI.IN_PLACE, total).Wait)

    def thread() -> Callable[[], object]:
        np.copyto(total, values)
        return scaled(pool.submit(comm.Allreduce, MPI.IN_PLACE, total).result)

    # The bytes that a rank sends and receives in a mean, if each rank has its own node.
    ring = Ring(topology.learner_ranks, 2 * (topology.num_learners - 1) * 4 * numel // topology.num_learners)

    def tcp() -> Callable[[], object]:
        futures = ring.start()
        return lambda: [future.result() for future in futures]

    return found | {"MPI Iallreduce": iallreduce, "thread in Allreduce": thread, "bytes over TCP": tcp}


def _start(engine: Engine, rows: torch.Tensor) -> Callable[[], object]:
    return engine.start([rows], GLOBAL).wait


class Computation:
    """Training steps of a perceptron with about as many parameters as the mean has."""

    def __init__(self, num_parameters: int, batch: int) -> None:
        workload = mlp_workload(num_parameters)
        self.model = workload.build()
        self.inputs, _ = next(workload.batches(1, 0, batch))

    def __call__(self, steps: int) -> float:
        """Take `steps` steps; return the seconds they took on this rank."""
        started = time.perf_counter()
        for _ in range(steps):
            self.model.zero_grad()
            self.model(self.inputs).square().mean().backward()
        return time.perf_counter() - started


def overlap_percent(total_s: float, compute_s: float, pure_s: float) -> float:
    """Return the percentage of a mean that computation hides; the mean takes `pure_s` alone."""
    return 100 * max(0.0, 1 - (total_s - compute_s) / pure_s)


def measure(
    topology: Topology, start: Start, compute: Computation, ratio: float, repeats: int
) -> dict[str, list[float]]:
    """Return the slowest rank's seconds and the percentages that follow, a value for each repeat."""
    comm = topology.learner_ranks
    pilot = common.in_turns(comm, {"mean": lambda: start()(), "compute": lambda: compute(_PILOT_STEPS)}, 5)
    pure_s, steps_s = (statistics.median(values) for values in pilot.values())
    steps = max(1, round(ratio * pure_s / steps_s * _PILOT_STEPS))
    inside: list[float] = []

    def both() -> None:
        wait = start()
        inside.append(compute(steps))
        wait()

    parts = {"pure_s": lambda: start()(), "compute_s": lambda: compute(steps), "total_s": both}
    found = common.in_turns(comm, parts, repeats)
    found["compute_inside_s"] = [comm.allreduce(seconds, MPI.MAX) for seconds in inside[1:]]  # the first warmed up
    found["overlap_percent"] = list(map(overlap_percent, found["total_s"], found["compute_s"], found["pure_s"]))
    pairs = zip(found["compute_inside_s"], found["compute_s"], strict=True)
    found["slower_percent"] = [100 * (beside / alone - 1) for beside, alone in pairs]
    return found


def main() -> None:
    """Measure every kind of mean and print the table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--bytes", type=int, default=11_000_000, help="size of the parameters [11000000]")
    parser.add_argument(
        "--compute-ratio", type=float, default=1.3, help="time of computation over that of a mean [1.3]"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="batch size of the training steps [128]")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    require_integer("bytes", options.bytes, 4)
    require_integer("repeats", options.repeats, 1)
    require_integer("batch_size", options.batch_size, 1)
    require_number("compute_ratio", options.compute_ratio, lambda ratio: ratio > 0, "a positive number")
    topology = common.start(options)
    compute = Computation(options.bytes // 4, options.batch_size)
    with ThreadPoolExecutor(1) as pool:
        results = {
            name: measure(topology, start, compute, options.compute_ratio, options.repeats)
            for name, start in contenders(topology, options.bytes // 4, pool).items()
        }
    title = f"means of {options.bytes} bytes behind computation, {counted(topology.num_learners, 'rank')}"
    title += f" on {counted(topology.num_nodes, 'node')}, {options.repeats} repeats"
    heads = ("", "pure ms", "compute ms", "total ms", "overlap %", "95 % interval", "slower %", "95 % interval")
    rows = []
    for name, found in results.items():
        times = [common.in_ms(found[part])[0] for part in ("pure_s", "compute_s", "total_s")]
        shares = (common.in_percent(found[part]) for part in ("overlap_percent", "slower_percent"))
        rows.append([name, *times, *(cell for share in shares for cell in share)])
    common.show(topology, title, heads, rows)
    common.report(topology, options, results)


if __name__ == "__main__":
    run(main)
