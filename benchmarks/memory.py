"""Peak memory of a rank beyond that of plain PyTorch, in copies of the parameters.

    mpirun -np 2 python -m benchmarks.memory [--algorithms k_avg hier_avg dasgd] [--parameters 20e6] [--json FILE]

The baseline is a large model after some plain SGD steps: it holds parameters and gradients. Then an `Averager` is
made, while a thread reads the process's memory every 5 ms. A rank's memory is its private pages (Pss: pages of several
ranks count once) and its share of /dev/shm, which counts in full once it is reserved. What MPI and torch allocate
meanwhile is included. There are three peaks: making the averager (setup), steps through several means, and `finish`.
"plain" takes the same steps without an averager: the error of the method. held: what remains after that. left: what
remains when model and averager are gone; if later rows release it, their figures are too small.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.options import run
from benchmarks.workloads import build_rule, mlp_workload
from hpcavg import Averager, Topology
from hpcavg.algorithms.rule import Rule
from hpcavg.errors import require_number
from hpcavg.utils.text import counted

RULE_OPTIONS = {"k": 2, "k1": 2, "k2": 4, "tau": 3, "delay": 2, "h": 2}
STEPS = 6  # with these options: several global means, and a delayed one in flight at the end
_LOOK_S = 0.005
_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def memory_of(smaps_rollup: str, maps: str, ranks_on_node: int) -> int:
    """Return the bytes that a process holds; the ranks of a node share the bytes in /dev/shm.

    Mappings of /dev/shm count in full because they are reserved, even pages that are not touched yet.

    Parameters
    ----------
    smaps_rollup : str
        The contents of /proc/PID/smaps_rollup.
    maps : str
        The contents of /proc/PID/maps.
    ranks_on_node : int
        The ranks of this node.
    """
    fields = dict(line.split(":", 1) for line in smaps_rollup.splitlines()[1:])
    private = sum(int(fields[name].split()[0]) * sign for name, sign in (("Pss", 1), ("Pss_Shmem", -1)))
    shared = 0
    for line in maps.splitlines():
        if "/dev/shm/" in line:
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            shared += last - first
    return private * 1024 + shared // ranks_on_node


class Watch:
    """Reads this process's memory from a thread, inside a ``with`` block; `peak` is the largest value."""

    def __init__(self, ranks_on_node: int) -> None:
        self._ranks_on_node = ranks_on_node
        self._done = threading.Event()
        self.peak = 0

    def now(self) -> int:
        """Return the bytes that are held now."""
        process = Path("/proc/self")
        return memory_of((process / "smaps_rollup").read_text(), (process / "maps").read_text(), self._ranks_on_node)

    def _look(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(_LOOK_S)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def settled(ranks_on_node: int) -> int:
    """Return the bytes that this process holds after it has released unused memory."""
    gc.collect()
    _LIBC.malloc_trim(0)
    return Watch(ranks_on_node).now()


def measure(rule: Rule | None, topology: Topology, num_parameters: float, engine: str) -> dict[str, float]:
    """Return the largest peaks of all ranks, in copies of the parameters. Without a rule steps are plain SGD."""
    workload = mlp_workload(num_parameters)
    model = workload.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
    inputs, targets = next(workload.batches(1, 0, 1))
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    ranks_on_node = topology.node.Get_size()
    averager: Averager | None = None

    def take(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            if averager is None:
                optimizer.step()
            else:
                averager.step()

    take(2)
    baseline = settled(ranks_on_node)
    found = {}
    for part in ("setup", "steps", "finish"):
        topology.all_ranks.Barrier()
        with Watch(ranks_on_node) as watch:
            if part == "steps":
                take(STEPS)
            elif part == "setup" and rule is not None:
                averager = Averager(model, optimizer, rule, topology, engine=engine)
            elif averager is not None:
                averager.finish()
        found[part] = (watch.peak - baseline) / num_bytes
    found["held"] = (settled(ranks_on_node) - baseline) / num_bytes
    return {part: topology.all_ranks.allreduce(value, MPI.MAX) for part, value in found.items()}


def main() -> None:
    """Measure every algorithm and print the table on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["k_avg", "hier_avg", "dasgd", "slowmo", "diloco"])
    parser.add_argument("--engines", nargs="+", default=["auto"], help="how means are taken [auto]")
    parser.add_argument("--parameters", type=float, default=20e6, help="size of the model [20e6]")
    parser.add_argument("--group-size", type=int, help="ranks of a local group [those of a node]")
    options = parser.parse_args()
    require_number("parameters", options.parameters, lambda n: n >= 4, "a number of at least 4")
    rules = {name.replace("-", "_"): build_rule(name.replace("-", "_"), RULE_OPTIONS) for name in options.algorithms}
    topology = common.start(options, options.group_size)
    # Large arrays go back to the system when they are freed, so the peak is of memory in use.
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 2**20)
    measure(None, topology, options.parameters, "auto")  # warms up torch
    ways: list[tuple[str, Rule | None, str]] = [("plain", None, "auto")]
    ways += [(f"{name}, {engine}", rule, engine) for engine in options.engines for name, rule in rules.items()]
    results: dict[str, dict[str, float]] = {}
    for label, rule, engine in ways:
        before = settled(topology.node.Get_size())
        found = measure(rule, topology, options.parameters, engine)
        left = (settled(topology.node.Get_size()) - before) / (4 * options.parameters)
        results[label] = found | {"left": topology.all_ranks.allreduce(left, MPI.MAX)}
        common.say(topology, f"{label}: {results[label]['steps']:.2f}")
    title = f"copies of {options.parameters:.3g} parameters beyond those, their gradients and the optimizer's state"
    title += f", {counted(topology.num_learners, 'rank')} on {counted(topology.num_nodes, 'node')}"
    heads = ("", "setup", "steps", "finish", "held", "left")
    rows = [[name, *(f"{found[part]:.2f}" for part in heads[1:])] for name, found in results.items()]
    common.show(topology, title, heads, rows)
    common.report(topology, options, {"copies": results})


if __name__ == "__main__":
    run(main)
