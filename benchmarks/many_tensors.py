"""The cost of a model with very many small tensors: making the averager, and a step with a mean.

The optimizer's step and a mean of one array of the same size are timed, too. The rest is the overhead of the tensors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import common
from benchmarks.options import run
from hpcavg import Averager, algorithms
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.engines.select import select_engine
from hpcavg.errors import require_integer
from hpcavg.utils.text import counted


def main() -> None:
    """Measure and print the table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--elements", type=int, default=3, help="elements of each tensor")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for name in ("tensors", "elements", "repeats"):
        require_integer(name, getattr(options, name), 1)
    topology = common.start(options)
    model = nn.ParameterList([nn.Parameter(torch.randn(options.elements)) for _ in range(options.tensors)])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)
    started = time.perf_counter()
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology)
    made_s = topology.learner_ranks.allreduce(time.perf_counter() - started) / topology.num_learners
    engine = select_engine("auto", topology)
    numel = sum(-(-parameter.numel() // 16) * 16 for parameter in model.parameters())  # each has at least a cache line
    rows = engine.allocate(torch.zeros(1, numel))
    calls: dict[str, Callable[[], object]] = {
        "optimizer.step": optimizer.step,
        "averager.step, mean due": averager.step,
        "the mean alone": lambda: engine.mean(rows, rows[0], GLOBAL),
    }
    seconds = common.in_turns(topology.learner_ranks, calls, options.repeats)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    own, step, mean = medians.values()
    title = f"{options.tensors} tensors of {options.elements} elements, {counted(topology.num_learners, 'rank')}, ms"
    table = [(name, f"{value:.2f}") for name, value in medians.items()]
    table += [("over both", f"{step - own - mean:.2f}"), ("making the averager", f"{1000 * made_s:.0f}")]
    common.show(topology, title, ("", "median"), table)
    common.report(topology, options, {"seconds": seconds, "made_s": made_s})


if __name__ == "__main__":
    run(main)
