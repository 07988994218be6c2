"""``python -m hpcavg info``: where ranks run, and how means would be taken there, and why."""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from typing import Any

import torch
from mpi4py import MPI

import hpcavg
from hpcavg import mean, placement
from hpcavg.config import Config
from hpcavg.topology import Topology

# About the size of a ResNet-18: what engines are tried with.
_TRIAL_ELEMENTS = 11 * 10**6


def main(config: Config) -> None:
    """Print one table of all nodes and the engine that `config` gets there, on rank 0. Collective over all ranks."""
    topology = Topology(group_size=config.group_size, num_servers=config.servers)
    device = topology.do_together(lambda: placement.choose_device(config.device, topology.node_rank))
    own = {
        "node": MPI.Get_processor_name(),
        "rank": topology.rank,
        "group": "server" if topology.is_server else topology.group,
        "cores": len(os.sched_getaffinity(0)),
        "threads": config.threads or placement.num_threads(topology.node),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "shared_bytes": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
    }
    engine = topology.do_together(lambda: mean.select(config.engine, topology, device))
    if not topology.is_server:
        engine.home(torch.empty(1, _TRIAL_ELEMENTS, device=device))
    ranks = topology.everyone.gather(own)
    if ranks is not None:
        _print(topology, engine, ranks)


def _print(topology: Topology, engine: mean.Engine, ranks: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    on_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rank in ranks:
        on_node[rank["node"]].append(rank)
    table = Table()
    for head in ("node", "ranks", "local groups", "cores", "threads per rank", "device", "memory to share"):
        table.add_column(head)
    for node, members in on_node.items():
        table.add_row(
            node,
            _span(member["rank"] for member in members),
            _span(member["group"] for member in members),
            str(max(member["cores"] for member in members)),
            _span(member["threads"] for member in members),
            ", ".join(sorted({member["device"] for member in members})),
            f"{min(member['shared_bytes'] for member in members) / 2**30:.1f} GiB",
        )
    console = Console(width=120, force_terminal=False)
    console.print(table)
    library = MPI.Get_library_version().split(",")[0].strip("\0\n ")
    threads = {MPI.THREAD_MULTIPLE: "multiple", MPI.THREAD_SERIALIZED: "serialized"}.get(MPI.Query_thread(), "none")
    lines = [
        f"hpcavg {hpcavg.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {library}"
        f" (threads: {threads})",
        f"{topology.num_learners} learners, {topology.num_servers} servers, {topology.num_nodes} nodes,"
        f" {topology.num_groups} local groups",
        f"engine {engine.name}",
        *(f"  {note}" for note in engine.notes),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _span(values: Any) -> str:
    """Return values in their order, runs of integers as the first and the last."""
    distinct = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    parts: list[list[Any]] = []
    for value in distinct:
        if parts and isinstance(value, int) and parts[-1][-1] == value - 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join("-".join(map(str, part)) for part in parts)
