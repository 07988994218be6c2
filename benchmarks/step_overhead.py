"""The overhead of `Averager.step` over ``optimizer.step`` in a step without a mean, and in one with a mean due.

Both are timed in turns on the same parameters, in many short rounds, so a slow spell of the machine affects both. The
figure is the median difference over the rounds, of the rank on which it is largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import common
from benchmarks.figures import interval
from benchmarks.options import run
from hpcavg import Averager, Topology, algorithms
from hpcavg.algorithms.rule import Rule
from hpcavg.errors import require_integer
from hpcavg.models import build
from hpcavg.utils.text import counted

NEVER = 10**9
RULES: dict[str, Rule] = {
    "sgd": algorithms.sgd(),
    "k_avg": algorithms.k_avg(NEVER),
    "hier_avg": algorithms.hier_avg(NEVER - 1, NEVER),
    "post_local_sgd": algorithms.post_local_sgd(0, NEVER),
    "ada_lupa": algorithms.ada_lupa(NEVER, mu=1.0, shift=9.0),
    "pr_sgd_hetero": algorithms.pr_sgd_hetero(epoch_seconds=float(NEVER)),
    "dasgd": algorithms.dasgd(NEVER, 2),
    "k_avg, with a mean in each step": algorithms.k_avg(1),
}


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Return the mean seconds of a call, over `calls` calls."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def measure(rule: Rule, topology: Topology, rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the microseconds of both steps, a value per round, of the rank with the largest median difference."""
    model = build("cnn", (1, 8, 8), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    averager = Averager(model, optimizer, rule, topology)
    plain, ours = [], []
    for _ in range(rounds):
        plain.append(seconds_per_call(optimizer.step, calls) * 1e6)
        ours.append(seconds_per_call(averager.step, calls) * 1e6)
    medians = topology.learner_ranks.allgather(statistics.median(differences(plain, ours)))
    own = {"optimizer_step_us": plain, "averager_step_us": ours}
    return topology.learner_ranks.bcast(own, root=medians.index(max(medians)))


def differences(plain: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return how much longer each of `ours` took than the same round of `plain`."""
    return [b - a for a, b in zip(plain, ours, strict=True)]


def main() -> None:
    """Measure every rule and print the table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=50, help="calls in a round")
    options = parser.parse_args()
    require_integer("rounds", options.rounds, 2)
    require_integer("calls", options.calls, 1)
    topology = common.start(options)
    results = {name: measure(rule, topology, options.rounds, options.calls) for name, rule in RULES.items()}
    ranks = counted(topology.num_learners, "rank")
    title = f"step overhead, {ranks}, {options.rounds} rounds of {options.calls} calls, us"
    rows = []
    for name, (plain, ours) in ((name, found.values()) for name, found in results.items()):
        overhead, low, high = interval(differences(plain, ours))
        steps = (f"{statistics.median(values):.2f}" for values in (plain, ours))
        rows.append((name, *steps, f"{overhead:.2f}", f"{low:.2f} to {high:.2f}"))
    common.show(topology, title, ("", "optimizer.step", "averager.step", "overhead", "95 % interval"), rows)
    common.report(topology, options, results)


if __name__ == "__main__":
    run(main)
