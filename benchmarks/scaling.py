"""Weak and strong scaling of training over 1, 2, 4, ... ranks, under one mpirun.

    mpirun -np 4 python -m benchmarks.scaling [--algorithms hier_avg dasgd] [--batch-size 32] [--json FILE]

The first n ranks train while the others sleep. Weak: every learner has a batch of `--batch-size`. Strong: the n
learners share a batch of `--batch-size` times the number of all ranks. Efficiency is samples per second over n times
those of one learner in the same turn. It cannot reach 100 % if there are more ranks than cores.
"""

from __future__ import annotations

import gc
import os
import statistics
from typing import Any

from mpi4py import MPI

from benchmarks import common
from benchmarks.figures import interval
from benchmarks.options import run
from benchmarks.workloads import Learner, Workload, build_rule, mlp_workload, throughput
from hpcavg import Topology
from hpcavg.algorithms.rule import Rule
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.errors import require_integer, require_number
from hpcavg.utils.text import counted

RULE_OPTIONS = {"k": 16, "k1": 4, "k2": 16, "tau": 16, "delay": 8}


def rank_counts(num_ranks: int) -> list[int]:
    """Return 1, 2, 4, ... and `num_ranks` itself."""
    return sorted({2**power for power in range(num_ranks.bit_length())} | {num_ranks})


def batch_of(kind: str, batch_size: int, num_ranks: int, learners: int) -> int:
    """Return the batch size of a learner: the same for any number of learners, or its share of a fixed total."""
    return batch_size if kind == "weak" else max(1, batch_size * num_ranks // learners)


def first_ranks(topology: Topology, count: int) -> Topology | None:
    """Return the topology of the first `count` ranks; None on the others. Collective."""
    comm = topology.learner_ranks.Split(int(topology.rank >= count), topology.rank)
    assert isinstance(comm, MPI.Intracomm)
    return Topology(comm) if topology.rank < count else None


def measure(workload: Workload, rule: Rule, subset: Topology | None, batch_size: int, seconds: float) -> float | None:
    """Return the samples per second of the learners of `subset`; None on other ranks."""
    if subset is None:
        return None
    learner = Learner(workload, rule, subset, batch_size)
    found = throughput(learner, rule, subset.learner_ranks, seconds).samples_per_s
    del learner
    gc.collect()  # before the next learner takes memory
    return found


def main() -> None:
    """Measure all numbers of ranks, in turns, and print a table for each kind of scaling on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "hier_avg", "dasgd"])
    parser.add_argument("--parameters", type=float, default=1e6, help="size of the mlp [1e6]")
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a learner on all ranks [32]")
    parser.add_argument("--seconds", type=float, default=0.5, help="computation per figure [0.5]")
    parser.add_argument("--repeats", type=int, default=5)
    for name, default in RULE_OPTIONS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    options = parser.parse_args()
    for name in ("batch_size", "repeats"):
        require_integer(name, getattr(options, name), 1)
    require_number("parameters", options.parameters, lambda n: n >= 4, "a number of at least 4")
    rule_options = {name: getattr(options, name) for name in RULE_OPTIONS}
    rules = {name.replace("-", "_"): build_rule(name.replace("-", "_"), rule_options) for name in options.algorithms}
    topology = common.start(options)
    workload = mlp_workload(options.parameters)
    counts = rank_counts(topology.num_learners)
    subsets = {count: first_ranks(topology, count) for count in counts}
    kinds = ("weak", "strong")
    rates: dict[str, dict[str, dict[str, list[float]]]] = {
        kind: {name: {str(count): [] for count in counts} for name in rules} for kind in kinds
    }
    for _ in range(options.repeats):  # in turns: a slow spell of the machine affects all
        for kind in kinds:
            for name, rule in rules.items():
                for count in counts:
                    batch_size = batch_of(kind, options.batch_size, topology.num_learners, count)
                    rate = measure(workload, rule, subsets[count], batch_size, options.seconds)
                    wait_asleep(topology.learner_ranks)
                    rates[kind][name][str(count)].append(topology.learner_ranks.bcast(rate))
    for kind in kinds:
        _show(topology, f"{kind} scaling, {workload.name}", rates[kind])
    common.report(topology, options, {"samples_per_s": rates})


def _show(topology: Topology, title: str, rates: dict[str, dict[str, list[float]]]) -> None:
    cores = len(os.sched_getaffinity(0))
    title += f", up to {counted(topology.num_learners, 'rank')} on {counted(topology.num_nodes, 'node')}"
    title += f" of {counted(cores, 'core')}"
    rows: list[list[Any]] = []
    for name, by_count in rates.items():
        for count, values in by_count.items():
            rate, low, high = interval(values)
            efficiency = statistics.median(
                value / (int(count) * first) for value, first in zip(values, by_count["1"], strict=True)
            )
            rows.append([name, count, f"{rate:.1f}", f"{low:.1f} to {high:.1f}", f"{efficiency:.1%}"])
    common.show(topology, title, ("", "ranks", "samples/s", "95 % interval", "efficiency"), rows)


if __name__ == "__main__":
    run(main)
