"""``python -m hpcavg info``: where ranks run, how means would be taken there and why, and what will hurt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from mpi4py import MPI

from hpcavg.config.options import Config
from hpcavg.distributed import job_environment, launchers
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.engines.base import Engine
from hpcavg.engines.gpu.cuda_support import find_cuda_awareness
from hpcavg.engines.select import select_engine
from hpcavg.errors import InputError
from hpcavg.machine import mpi_library, placement, survey
from hpcavg.machine.advice import warnings
from hpcavg.machine.place import Place, by_node
from hpcavg.results.summary import counted
from hpcavg.training import failures
from hpcavg.utils.text import fold_names, fold_numbers

# About the size of a ResNet-18: what engines are tried with, where a node has room for it.
_TRIAL_ELEMENTS = 11 * 10**6

HEADS = ("node", "ranks", "local groups", "cores", "NUMA nodes", "threads per rank", "device", "free to share")


def main(config: Config) -> None:
    """Print one table of all nodes and the engine that `config` gets there, on rank 0. Collective over all ranks."""
    wait_asleep(MPI.COMM_WORLD)
    topology = Topology(failures.all_ranks(config), group_size=config.group_size, num_servers=config.servers)
    device = topology.run_on_all_ranks(lambda: placement.choose_device(config.device, topology.node_rank))
    threads = config.threads or placement.num_threads(topology.node)
    place = survey.find_place(topology, device, threads)
    engine = topology.run_on_all_ranks(lambda: select_engine(config.engine, topology, device))
    _try(engine, topology, device, place.shared_bytes)
    is_cuda_aware, how_known = find_cuda_awareness(topology)
    places = topology.all_ranks.gather(place)
    if places is None:
        return
    num_bytes, size = _model_size(config)
    lines = [
        *_of_software(places[0]),
        f"CUDA-aware: {'yes' if is_cuda_aware else 'no'} ({how_known})",
        f"{counted(topology.num_learners, 'learner')}, {counted(topology.num_servers, 'server')},"
        f" {counted(topology.num_nodes, 'node')}, {counted(topology.num_groups, 'local group')};"
        f" model of {size}",
        f"engine {engine.name}",
        *(f"  {note}" for note in engine.notes),
        *(f"warning: {text}" for text in warnings(places, survey.find_plan(config, num_bytes))),
    ]
    _print(places, lines)


def _try(engine: Engine, topology: Topology, device: torch.device, shared_bytes: int) -> None:
    """Let the engine find out what it can do with an array of some size. Collective over all ranks."""
    room = min(topology.all_ranks.allgather(shared_bytes // topology.node.Get_size() // 8))  # half, of float32
    if not topology.is_server and room:
        engine.allocate(torch.empty(1, min(_TRIAL_ELEMENTS, room), device=device))


def _model_size(config: Config) -> tuple[int, str]:
    """Return the size of the model in bytes, 0 where it cannot be found out, and the same in words, with why."""
    try:
        num_bytes = survey.model_bytes(config)
    except InputError as error:
        return 0, f"unknown size: {error.as_option()}"
    return num_bytes, f"{num_bytes / 1e6:.3g} MB"


def table(places: Sequence[Place]) -> list[tuple[str, ...]]:
    """Return the rows under `HEADS`: one for the ranks of a node that have the same; nodes that are alike share theirs.

    places : those of all ranks, in their order.
    """
    alike: dict[tuple[tuple[str, ...], ...], list[list[Place]]] = {}
    for members in by_node(places).values():
        kinds: dict[tuple[object, ...], list[Place]] = {}
        for place in members:
            kinds.setdefault((len(place.cores), place.threads, place.device, place.group is None), []).append(place)
        shape = tuple((str(len(kind)), *_what_they_have(kind)) for kind in kinds.values())
        rows = alike.setdefault(shape, [[] for _ in kinds])
        for row, kind in zip(rows, kinds.values(), strict=True):
            row.extend(kind)
    return [
        (*_who_they_are(row, int(number)), *has, f"{min(place.shared_bytes for place in row) / 2**30:.1f} GiB")
        for shape, rows in alike.items()
        for (number, *has), row in zip(shape, rows, strict=True)
    ]


def _who_they_are(row: Sequence[Place], number: int) -> tuple[str, str, str]:
    nodes = {place.node for place in row}
    is_many = len(nodes) > 1
    groups = fold_numbers(place.group for place in row if place.group is not None)
    return (
        f"{fold_names(place.node for place in row)}{f': {len(nodes)}' if is_many else ''}",
        f"{fold_numbers(place.rank for place in row)}{f' ({number} each)' if is_many else ''}",
        groups or "servers",
    )


def _what_they_have(kind: Sequence[Place]) -> tuple[str, str, str, str]:
    """Return the same for all ranks of a node that have as many cores and threads and are on devices of one kind."""
    cores, own = frozenset[int]().union(*(place.cores for place in kind)), len(kind[0].cores)
    given = kind[0].given
    texts = [str(len(cores))]
    if own < len(cores):
        texts.append(f"{own} each")
    if given is not None and given < len(cores):
        texts.append(f"{given} given")
    indices = [place.gpu_index for place in kind if place.gpu_index is not None]
    return (
        ", ".join(texts),
        fold_numbers(number for place in kind for number in place.numa_nodes),
        str(kind[0].threads),
        f"{kind[0].device}{f' ({fold_numbers(indices)})' if indices else ''}",
    )


def _of_software(first: Place) -> Iterator[str]:
    """Yield what rank 0 knows of the libraries and of who started it."""
    versions = dict(first.versions)
    mpi, messages_by, ucx_version = (versions.pop(name) for name in ("MPI", "messages by", "UCX"))
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"{mpi}, thread level {first.thread_level}"
    yield f"messages go by: {messages_by} ({mpi_library.messages_by(os.environ)[1]})"
    ucx = mpi_library.ucx()
    if ucx is None:
        yield "UCX: not in this process (its memory map)"
    else:
        uses = {"ucx": "sends the messages", "unknown": "may send the messages"}
        use = uses.get(messages_by, "does not send the messages")
        yield f"UCX: {ucx_version} is in this process and {use}; transports loaded: {', '.join(ucx[1]) or 'built-in'}"
    yield _fault_tolerance(mpi, mpi_library.has_fault_tolerance(), first.is_fault_tolerant)
    settings = mpi_library.settings(os.environ)
    yield f"settings: {' '.join(f'{name}={value}' for name, value in settings.items()) or 'none'}"
    job = job_environment.scheduler_job(os.environ)
    yield f"launcher: {launchers.started_by(os.environ)}{f', {job}' if job else ''}"


def _fault_tolerance(mpi: str, has: bool, is_on: bool) -> str:
    if not mpi_library.is_open_mpi(mpi):
        return "fault tolerance: none that hpcavg can use, which is Open MPI's"
    on = "switched on" if is_on else "not switched on (mpirun --with-ft ulfm)"
    return f"fault tolerance: the library {'has' if has else 'lacks'} it; {on}"


def _print(places: Sequence[Place], lines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEADS)
    for row in table(places):
        shown.add_row(*row)
    console = Console(width=120, force_terminal=False, markup=False)
    console.print(shown)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
