"""What `Averager.step` costs over ``optimizer.step`` at a step where no mean is due.

Both are timed in turn on the same parameters, many short rounds each; the figure is the median over the rounds of their
difference, with the quartiles beside it, so that a slow spell of the machine meets both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mpi4py import MPI

from hpcavg import Averager, Topology, algorithms
from hpcavg.models import build
from hpcavg.rule import Rule

NEVER = 10**9
RULES: dict[str, Rule] = {
    "sgd": algorithms.sgd(),
    "k_avg": algorithms.k_avg(NEVER),
    "hier_avg": algorithms.hier_avg(NEVER - 1, NEVER),
    "post_local_sgd": algorithms.post_local_sgd(0, NEVER),
    "ada_lupa": algorithms.ada_lupa(NEVER, mu=1.0, shift=9.0),
    "pr_sgd_hetero": algorithms.pr_sgd_hetero(epoch_seconds=float(NEVER)),
    "dasgd": algorithms.dasgd(NEVER, 2),
}


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of one of `calls` calls."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def measure(rule: Rule, topology: Topology, rounds: int, calls: int) -> dict[str, float]:
    """Return the microseconds of both steps and of their difference: medians over `rounds` rounds, slowest rank."""
    model = build("cnn", (1, 8, 8), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    averager = Averager(model, optimizer, rule, topology)
    plain, ours = [], []
    for _ in range(rounds):
        plain.append(seconds_per_call(optimizer.step, calls) * 1e6)
        ours.append(seconds_per_call(averager.step, calls) * 1e6)
    quarters = statistics.quantiles([b - a for a, b in zip(plain, ours, strict=True)], n=4)
    own = {
        "optimizer_step_us": statistics.median(plain),
        "averager_step_us": statistics.median(ours),
        "overhead_us": quarters[1],
        "overhead_q1_us": quarters[0],
        "overhead_q3_us": quarters[2],
    }
    return {name: topology.world.allreduce(value, MPI.MAX) for name, value in own.items()}


def main() -> None:
    """Measure every rule and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=50, help="calls in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    topology = Topology()
    results = {name: measure(rule, topology, options.rounds, options.calls) for name, rule in RULES.items()}
    if topology.rank == 0:
        print(f"# step overhead, {topology.num_learners} ranks, {options.rounds} rounds of {options.calls} calls, us")
        print(f"{'algorithm':16}{'optimizer.step':>16}{'averager.step':>16}{'overhead':>10}{'  (quartiles)'}")
        for name, row in results.items():
            plain, ours, overhead, first, third = row.values()
            print(f"{name:16}{plain:16.2f}{ours:16.2f}{overhead:10.2f}  ({first:.2f} to {third:.2f})")
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
