"""How fast a mean over the learners is: our engines, MPI alone, PyTorch's own, and the floor of copying once.

    mpirun -np 4 python -m benchmarks.mean [--max-mb 45] [--repeats 15] [--json FILE]

All of them average the same float32 parameters on the same ranks in one run, in turns, so that a slow spell of the
machine meets all alike. The figure is the slowest rank's time, its median over the repeats with a 95 % confidence
interval. algbw is bytes over time; busbw is what a ring would have to move, 2 (P - 1)/P times that.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import distributed
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from hpcavg import Topology
from hpcavg.mean import ENGINES
from hpcavg.schedule import Scope

PARAMETER_ELEMENTS = 2**18  # the size of a parameter tensor where an averager works tensor by tensor


def contenders(topology: Topology, numel: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; every call takes one mean of `numel` elements per rank."""
    found: dict[str, Callable[[], object]] = {}
    source, target = torch.ones(numel), torch.ones(numel)
    found["copy once"] = lambda: target.copy_(source)
    for name, make in ENGINES.items():
        engine = make(topology)
        rows = engine.home(torch.ones(1, numel))
        rows.fill_(1.0)
        found[f"hpcavg {name}"] = functools.partial(engine.mean, rows, rows[0], Scope.GLOBAL)
    raw = np.ones(numel, dtype=np.float32)

    def allreduce() -> None:
        topology.world.Allreduce(MPI.IN_PLACE, raw)
        np.divide(raw, topology.num_learners, out=raw)

    found["MPI Allreduce"] = allreduce
    values = torch.ones(numel)

    def gloo() -> None:
        distributed.all_reduce(values)
        values.div_(topology.num_learners)

    found["gloo all_reduce"] = gloo
    parameters = [torch.nn.Parameter(part.clone()) for part in torch.ones(numel).split(PARAMETER_ELEMENTS)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # it leaves out parameters that have none
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    found["torch averager"] = lambda: averager.average_parameters(parameters)
    return found


def measure(topology: Topology, calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every call, `repeats` of each in turns: the slowest rank's, from a common start."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):  # two to warm up
        for name, call in calls.items():
            topology.world.Barrier()
            started = time.perf_counter()
            call()
            slowest = topology.world.allreduce(time.perf_counter() - started, MPI.MAX)
            if repeat >= 0:
                seconds[name].append(slowest)
    return seconds


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % confidence interval, from the order of the values."""
    ordered = sorted(values)
    spread = 0.98 * len(ordered) ** 0.5
    low = max(0, int(len(ordered) / 2 - spread))
    high = min(len(ordered) - 1, int(len(ordered) / 2 + spread))
    return float(np.median(ordered)), ordered[low], ordered[high]


def main() -> None:
    """Sweep the sizes and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, nargs="+", default=[2**10, 2**14, 2**16, 2**20, 2**22, 44_700_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "When period is 1")
    topology = Topology()
    folder = topology.world.bcast(tempfile.mkdtemp() if topology.rank == 0 else None)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=topology.rank, world_size=topology.num_learners
    )
    results: dict[str, dict[str, list[float]]] = {}
    for num_bytes in options.bytes:
        numel = max(1, num_bytes // 4)
        seconds = measure(topology, contenders(topology, numel), options.repeats)
        results[str(4 * numel)] = seconds
        if topology.rank == 0:
            _show(4 * numel, seconds, topology.num_learners)
    distributed.destroy_process_group()
    if topology.rank == 0 and options.json:
        environment = {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
            "mpi": MPI.Get_library_version().split(",")[0],
            "ranks": topology.num_learners,
        }
        options.json.write_text(json.dumps({"environment": environment, "seconds": results}, indent=2) + "\n")


def _show(num_bytes: int, seconds: dict[str, list[float]], num_learners: int) -> None:
    print(f"# mean of {num_bytes} bytes over {num_learners} ranks")
    print(f"{'':18}{'median ms':>12}{'95 % interval':>22}{'algbw GB/s':>12}{'busbw GB/s':>12}{'/ Allreduce':>12}")
    reference = interval(seconds["MPI Allreduce"])[0]
    for name, values in seconds.items():
        median, low, high = interval(values)
        algbw = num_bytes / median / 1e9
        busbw = algbw * 2 * (num_learners - 1) / num_learners
        between = f"{low * 1e3:.3f} to {high * 1e3:.3f}"
        print(f"{name:18}{median * 1e3:12.3f}{between:>22}{algbw:12.2f}{busbw:12.2f}{reference / median:12.2f}")
    print(flush=True)


if __name__ == "__main__":
    main()
