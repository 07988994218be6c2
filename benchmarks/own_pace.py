"""The cost of a slow rank, with rounds of equal steps and with rounds at each learner's own pace.

    mpirun -np 4 python -m benchmarks.own_pace [--slowdown 3] [--step-ms 5] [--seconds 12] [--json FILE]

A step is a sleep, so ranks that share cores do not slow each other. Rank 0 sleeps `--slowdown` times as long. The
figure is the share of time that fast ranks wait: for PR-SGD with a wall-clock budget, for PR-SGD with measured steps,
and for K-AVG with the mean period of the first. For measured steps, their error against the true ratio of speeds
follows.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks import common
from benchmarks.options import run
from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.algorithms.rule import Rule
from hpcavg.errors import require_number


def measure(rule: Rule, topology: Topology, step_s: float, seconds: float) -> dict[str, list[float]]:
    """Train for about `seconds`, up to a mean; return every rank's share of time waited, steps per round and speed."""
    parameter = torch.nn.Parameter(torch.zeros(10_000))
    averager = Averager(torch.nn.Module(), torch.optim.SGD([parameter], lr=0.1), rule, topology)
    parameter.grad = torch.zeros_like(parameter)
    started, rounds = time.perf_counter(), 0
    while True:
        time.sleep(step_s)
        averager.step()
        if averager.progress.round > rounds:
            rounds = averager.progress.round
            if topology.learner_ranks.bcast(time.perf_counter() - started > seconds):
                break
    wall_s = time.perf_counter() - started
    averager.finish()
    return {
        "waited": topology.learner_ranks.allgather(averager.totals.blocked_s / wall_s),
        "period": topology.learner_ranks.allgather(averager.events[-1].period_steps),
        "steps_per_round": topology.learner_ranks.allgather(averager.progress.step / rounds),
        "steps_per_s": topology.learner_ranks.allgather(averager.progress.step / wall_s),
    }


def main() -> None:
    """Measure the three algorithms and print a table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--slowdown", type=float, default=3.0)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--budget-s", type=float, default=0.5, help="PR-SGD's wall-clock budget")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long each algorithm runs")
    options = parser.parse_args()
    for name in ("slowdown", "step_ms", "budget_s", "seconds"):
        require_number(name, getattr(options, name), lambda value: value > 0, "a positive number")
    topology = common.start(options)
    if topology.num_learners == 1:
        raise InputError("ranks", 1, "at least 2: one of them is slow; start it with mpirun")
    step_s = options.step_ms / 1000 * (options.slowdown if topology.rank == 0 else 1.0)
    results = {
        "wall clock": measure(
            algorithms.pr_sgd_hetero(epoch_seconds=options.budget_s), topology, step_s, options.seconds
        )
    }
    mean_period = round(float(np.mean(results["wall clock"]["steps_per_round"])))
    results[f"k_avg({mean_period})"] = measure(algorithms.k_avg(mean_period), topology, step_s, options.seconds)
    results["auto"] = measure(algorithms.pr_sgd_hetero(base_steps=16), topology, step_s, options.seconds)
    title = f"{topology.num_learners} ranks, rank 0 slowed {options.slowdown:g}-fold; step {options.step_ms:g} ms"
    rows = []
    for name, result in results.items():
        slow, *fast = result["waited"]
        waits = (f"{min(fast):.1%} to {max(fast):.1%}", f"{slow:.1%}")
        steps = " ".join(f"{period:g}" for period in result["period"])
        rows.append((name, *waits, f"{sum(result['steps_per_s']):.0f}", steps))
    heads = ("", "fast ranks wait", "rank 0 waits", "steps/s, all", "steps of the last round")
    common.show(topology, title, heads, rows)
    auto = np.array(results["auto"]["period"])
    error = np.abs(auto[1:] / auto[0] / options.slowdown - 1).max()
    common.say(topology, f"auto: I_i / I_0 within {error:.1%} of the true ratio {options.slowdown:g}")
    common.report(topology, options, results)


if __name__ == "__main__":
    run(main)
