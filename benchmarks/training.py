"""Samples per second and time to an accuracy of training: our algorithms and PyTorch's DDP.

    mpirun -np 4 python -m benchmarks.training [--model digits|mlp] [--algorithms hier_avg dasgd ...] [--json FILE]

single: one learner, while the other ranks sleep. sgd: all ranks without communication; "of sgd" is the share of this.
ddp: torch's DistributedDataParallel over gloo. A figure covers about `--seconds` of computation and a whole number of
global periods, so every algorithm pays for its means in full. On digits every algorithm is then trained again until the
mean of all learners reaches `--target`, evaluated once an epoch; the seconds are those of training alone.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from benchmarks import common, torch_peers
from benchmarks.figures import interval
from benchmarks.options import run
from benchmarks.workloads import Learner, Workload, build_rule, digits_workload, mlp_workload, throughput
from hpcavg import Topology
from hpcavg.algorithms.rule import Rule
from hpcavg.data.partition import num_batches
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.errors import require_integer, require_number
from hpcavg.utils.text import counted

ALGORITHMS = ("sync_sgd", "k_avg", "hier_avg", "dasgd")
# The periods of the mlp suit a network on which its mean takes seconds.
DEFAULTS = {
    "digits": {"batch_size": 16, "seconds": 2.0, "repeats": 5, "k": 8, "k1": 4, "k2": 32, "tau": 8, "delay": 4},
    "mlp": {"batch_size": 32, "seconds": 20.0, "repeats": 1, "k": 384, "k1": 16, "k2": 384, "tau": 96, "delay": 80},
}
RULE_OPTIONS = ("k", "k1", "k2", "tau", "delay")


def seconds_to(target: float, learner: Learner, steps_per_epoch: int, max_epochs: int, comm: MPI.Comm) -> float | None:
    """Train until the mean model's accuracy reaches `target`; return the seconds, or None if it never does."""
    trained_s = 0.0
    for _ in range(max_epochs):
        trained_s += common.slowest_s(comm, lambda: learner.train(steps_per_epoch))
        if comm.bcast(learner.accuracy() >= target):
            return trained_s
    return None


def alone(topology: Topology, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `action` on rank 0 while the others sleep, and return its result on all ranks. Collective."""
    result = action() if topology.rank == 0 else None
    wait_asleep(topology.learner_ranks)
    found = topology.learner_ranks.bcast(result)
    assert found is not None
    return found


def measure(
    workload: Workload, rule: Rule | str | None, topology: Topology, comm: MPI.Comm, options: Any
) -> dict[str, Any]:
    """Train with one algorithm and return its figures. Collective over `comm`."""
    learner = Learner(workload, rule, topology, options.batch_size, options.engine)
    found = vars(throughput(learner, rule, comm, options.seconds))
    del learner
    gc.collect()  # before the next learner takes memory
    if workload.num_train is not None:
        steps_per_epoch = num_batches(workload.num_train, comm.Get_size(), options.batch_size)
        learner = Learner(workload, rule, topology, options.batch_size, options.engine)
        found["seconds_to_target"] = seconds_to(options.target, learner, steps_per_epoch, options.max_epochs, comm)
    return found


def main() -> None:
    """Measure every algorithm and print the table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--model", choices=DEFAULTS, default="digits", help="digits: the embedded task [digits]")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), help=f"of hpcavg [{' '.join(ALGORITHMS)}]")
    parser.add_argument("--parameters", type=float, default=20e6, help="size of the mlp [20e6]")
    for name, default in DEFAULTS["mlp"].items():
        text = f"[{DEFAULTS['digits'][name]:g}; mlp: {default:g}]"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=text)
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy to reach [0.95]")
    parser.add_argument("--max-epochs", type=int, default=60, help="give up after so many epochs [60]")
    parser.add_argument("--engine", default="auto", help="how means are taken [auto]")
    parser.add_argument("--group-size", type=int, help="ranks of a local group [those of a node]")
    parser.add_argument("--interface", help="network interface for gloo [that of the node's name]")
    options = parser.parse_args()
    for name, default in DEFAULTS[options.model].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name in ("batch_size", "repeats", "max_epochs"):
        require_integer(name, getattr(options, name), 1)
    require_number("parameters", options.parameters, lambda n: n >= 4, "a number of at least 4")
    require_number("target", options.target, lambda share: 0 < share <= 1, "a share above 0 and at most 1")
    rule_options = {name: getattr(options, name) for name in RULE_OPTIONS}
    ways: dict[str, Rule | str | None] = {"single": None, "sgd": build_rule("sgd", {}), "ddp": "ddp"}
    ways |= {name.replace("-", "_"): build_rule(name.replace("-", "_"), rule_options) for name in options.algorithms}
    topology = common.start(options, options.group_size)
    is_digits = options.model == "digits"
    workload = digits_workload(topology) if is_digits else mlp_workload(options.parameters)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with torch_peers.gloo(topology, options.interface):
        for _ in range(options.repeats):  # in turns: a slow spell of the machine affects all
            for name, rule in ways.items():
                if rule is None:
                    found = alone(topology, lambda: measure(workload, None, topology, MPI.COMM_SELF, options))
                else:
                    found = measure(workload, rule, topology, topology.learner_ranks, options)
                results[name].append(found)
                common.say(topology, f"{name}: {found['samples_per_s']:.1f} samples/s")
    _show(topology, f"{workload.name}, batch {options.batch_size}", results)
    common.report(topology, options, results)


def _show(topology: Topology, title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    title += f", {counted(topology.num_learners, 'rank')} on {counted(topology.num_nodes, 'node')}"
    heads = ["", "samples/s", "95 % interval", "of sgd", "blocked", "hidden", "steps", "means"]
    with_target = "seconds_to_target" in results["sgd"][0]
    if with_target:
        heads += ["s to target", "95 % interval"]
    rows = []
    for name, found in results.items():
        rate, low, high = interval([turn["samples_per_s"] for turn in found])
        turns = zip(found, results["sgd"], strict=True)
        share = statistics.median(turn["samples_per_s"] / silent["samples_per_s"] for turn, silent in turns)
        row = [name, f"{rate:.1f}", f"{low:.1f} to {high:.1f}", f"{share:.1%}"]
        if name in ("single", "ddp"):
            row += ["-", "-", str(found[-1]["steps"]), "-"]
        else:
            hidden = [turn["hidden"] for turn in found if turn["hidden"] is not None]
            row += [f"{statistics.median(turn['blocked'] for turn in found):.1%}"]
            row += [f"{statistics.median(hidden):.1%}" if hidden else "-"]
            row += [str(found[-1]["steps"]), str(found[-1]["means"])]
        if with_target:
            # A run that never gets there counts as the slowest.
            times = [turn["seconds_to_target"] for turn in found]
            middle, low, high = interval([math.inf if value is None else value for value in times])
            row += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"] if middle < math.inf else ["not reached", "-"]
        rows.append(row)
    common.show(topology, title, heads, rows)


if __name__ == "__main__":
    run(main)
