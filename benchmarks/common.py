"""Shared by benchmarks under mpirun: options, timing, the record of the environment, tables and JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from benchmarks import options
from benchmarks.figures import interval
from hpcavg import Topology
from hpcavg.errors import InputError
from hpcavg.results.run_folder import git_revision
from hpcavg.training import eager

# -- options ------------------------------------------------------------------------------------------------------


class Parser(options.Parser):
    """The options of a benchmark under mpirun."""

    def __init__(self, text: str | None) -> None:
        super().__init__(text)
        self.add_argument("--json", type=Path, metavar="FILE", help="write figures and environment to FILE, too")


# -- time and statistics ------------------------------------------------------------------------------------------


def slowest_s(comm: MPI.Comm, call: Callable[[], object]) -> float:
    """Return the seconds that `call` takes on the slowest rank. All ranks start together. Collective."""
    comm.Barrier()
    started = time.perf_counter()
    call()
    return comm.allreduce(time.perf_counter() - started, MPI.MAX)


def in_turns(
    comm: MPI.Comm,
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    budget_s: float = math.inf,
    least: int = 3,
) -> dict[str, list[float]]:
    """Return the slowest rank's seconds of every call. Collective.

    The calls take turns, so a slow spell of the machine affects all of them. Each turn has another order, so no call
    always follows one that fills the caches. The first turn warms up and is not counted.

    Parameters
    ----------
    comm : MPI.Comm
        The ranks that make the calls.
    calls : mapping
        By name.
    repeats : int
        The number of turns.
    budget_s : float
        No turn begins after this many seconds.
    least : int
        The number of turns that are made in any case.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in range(-1, repeats):
        if turn >= least and comm.bcast(time.perf_counter() - started > budget_s):
            break
        for name in random.Random(turn).sample(list(calls), len(calls)):  # the same order on every rank
            taken = slowest_s(comm, calls[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


# -- the record ---------------------------------------------------------------------------------------------------


def environment(topology: Topology) -> dict[str, Any]:
    """Return the machine, the ranks and the versions that a benchmark ran with. Collective."""
    nodes = topology.all_ranks.gather(platform.node())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [*sys.orig_argv],
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "ranks": topology.all_ranks.Get_size(),
        "nodes": topology.num_nodes,
        "node_names": sorted(set(nodes or ())),
        "groups": topology.num_groups,
        "threads_per_rank": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "mpi4py", "numpy")},
        "mpi_library": MPI.Get_library_version().strip("\0\n "),
    }


def report(topology: Topology, options: argparse.Namespace, results: object) -> None:
    """Write options, environment and results to ``--json`` on rank 0. Collective."""
    where = environment(topology)
    if topology.rank == 0 and options.json:
        name = Path(sys.argv[0]).stem
        record = {"benchmark": name, "environment": where, "options": vars(options), "results": results}
        options.json.write_text(json.dumps(record, indent=2, default=str, allow_nan=False) + "\n")


def check_json(options: argparse.Namespace) -> None:
    """Raise `InputError` if the JSON file cannot be written; called before anything is measured."""
    if options.json and not os.access(options.json.absolute().parent, os.W_OK):
        raise InputError("json", options.json, "a file in a folder that can be written")


def start(options: argparse.Namespace, group_size: int | None = None) -> Topology:
    """Return the topology to measure on, with one torch thread per rank; check the common options."""
    check_json(options)
    eager.defer_compiler_import()  # saves 4 s per rank
    torch.set_num_threads(1)
    return Topology(group_size=group_size)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


# -- tables -------------------------------------------------------------------------------------------------------


def show(topology: Topology, title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on rank 0: the title after a #, then aligned columns, the first one to the left."""
    if topology.rank != 0:
        return
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"# {title}")
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join((first.ljust(widths[0]), *cells)).rstrip())
    print(flush=True)


def say(topology: Topology, text: str) -> None:
    """Print a line on rank 0."""
    if topology.rank == 0:
        print(text, flush=True)


def in_ms(values: Sequence[float]) -> tuple[str, str]:
    """Return the median and its interval of `values` in seconds, as milliseconds for a table."""
    median, low, high = (value * 1e3 for value in interval(values))
    return f"{median:.3f}", f"{low:.3f} to {high:.3f}"


def in_percent(values: Sequence[float]) -> tuple[str, str]:
    """Return the median and its interval of `values`, as percentages for a table."""
    median, low, high = interval(values)
    return f"{median:.1f}", f"{low:.1f} to {high:.1f}"
