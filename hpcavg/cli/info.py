"""``python -m hpcavg info``: what the ranks have, which engine they get and why, and what will hurt a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from mpi4py import MPI

from hpcavg.config.options import Config
from hpcavg.distributed import job_environment, launcher_variables
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.engines.base import Engine
from hpcavg.engines.compression import wire_format
from hpcavg.engines.gpu.cuda_support import find_cuda_awareness
from hpcavg.engines.select import select_engine
from hpcavg.errors import InputError
from hpcavg.machine import cores, devices, inspection, mpi_library
from hpcavg.machine.inventory import RankInventory, by_node
from hpcavg.machine.warnings import find_warnings
from hpcavg.training import failures
from hpcavg.utils.text import counted, fold_names, fold_numbers

# Engines are tried with an array of this size, about a ResNet-18, or a smaller one if a node has less room.
_TRIAL_ELEMENTS = 11 * 10**6

HEADS = ("node", "ranks", "local groups", "cores", "NUMA nodes", "threads per rank", "device", "free to share")


def main(config: Config) -> None:
    """Print a table of all nodes and the engine that `config` gets there, on rank 0. Collective over all ranks."""
    wait_asleep(MPI.COMM_WORLD)
    comm = failures.all_ranks(config)
    servers, per_rank = config.servers_of(comm.Get_size()), config.learners_of_rank(comm.Get_size())
    topology = Topology(comm, group_size=config.roles.group_size, num_servers=servers, learners_per_rank=per_rank)
    device = topology.run_on_all_ranks(lambda: devices.choose_device(config.run.device, topology.node_rank))
    threads = config.run.threads or cores.num_threads(topology.node)
    own = inspection.take_inventory(topology, device, threads)
    averaging = config.averaging
    form = wire_format(averaging.wire_dtype, averaging.error_feedback)
    engine = topology.run_on_all_ranks(
        lambda: select_engine(averaging.engine, topology, device, form, averaging.crossing)
    )
    _try(engine, topology, device, own.free_shared_bytes)
    is_cuda_aware, how_known = find_cuda_awareness(topology)
    ranks = topology.all_ranks.gather(own)
    if ranks is None:
        return
    num_bytes, size, how = _model_size(config, per_rank)
    lines = [
        *_of_software(ranks[0]),
        f"CUDA-aware: {'yes' if is_cuda_aware else 'no'} ({how_known})",
        f"{counted(topology.num_learners, 'learner')}{f' ({per_rank} in each rank)' if per_rank > 1 else ''},"
        f" {counted(topology.num_servers, 'server')},"
        f" {counted(topology.num_nodes, 'node')}, {counted(topology.num_groups, 'local group')};"
        f" model of {size}",
        *how,
        f"engine {engine.name}",
        *(f"  {note}" for note in engine.notes),
        *(f"warning: {text}" for text in find_warnings(ranks, inspection.find_needs(config, per_rank, num_bytes))),
    ]
    _print(ranks, lines)


def _try(engine: Engine, topology: Topology, device: torch.device, shared_bytes: int) -> None:
    """Let the engine find out what it can do with an array of some size. Collective over all ranks."""
    room = min(topology.all_ranks.allgather(shared_bytes // topology.node.Get_size() // 8))  # half, of float32
    if not topology.is_server and room:
        rows = topology.learners_per_rank
        engine.allocate(torch.empty(rows, min(_TRIAL_ELEMENTS, max(1, room // rows)), device=device))


def _model_size(config: Config, per_rank: int) -> tuple[int, str, list[str]]:
    """Return what is known of the model of `per_rank` learners.

    Returns
    -------
    int
        The size of one in bytes; 0 if it is unknown.
    str
        The size in words, or why it is unknown.
    list of str
        Lines on how several learners of a rank compute.
    """
    try:
        model = inspection.build_without_memory(config)
    except InputError as error:
        return 0, f"unknown size: {error.as_option()}", []
    num_bytes = inspection.model_bytes(config, model)
    size = f"{num_bytes / 1e6:.3g} MB"
    if per_rank == 1:
        return num_bytes, size, []
    is_loop = config.run.stacked_randomness == "exact" and inspection.has_random_layers(model)
    how = (
        "one after the other: the model has dropout (--stacked-randomness fast lets all draw at once)"
        if is_loop
        else "all at once, with torch.vmap; a model that it refuses, one after the other, as the run will say"
    )
    in_rank = f"{size}, {per_rank * num_bytes / 1e6:.3g} MB in each rank"
    return num_bytes, in_rank, [f"learners of a rank compute {how}"]


def table(ranks: Sequence[RankInventory]) -> list[tuple[str, ...]]:
    """Return the rows under `HEADS`: one for the ranks of a node that have the same. Nodes that are alike share rows.

    Parameters
    ----------
    ranks : sequence of RankInventory
        All ranks, in their order.
    """
    alike: dict[tuple[tuple[str, ...], ...], list[list[RankInventory]]] = {}
    for members in by_node(ranks).values():
        kinds: dict[tuple[object, ...], list[RankInventory]] = {}
        for rank in members:
            kinds.setdefault((len(rank.cores), rank.threads, rank.device, rank.group is None), []).append(rank)
        shape = tuple((str(len(kind)), *_what_they_have(kind)) for kind in kinds.values())
        rows = alike.setdefault(shape, [[] for _ in kinds])
        for row, kind in zip(rows, kinds.values(), strict=True):
            row.extend(kind)
    return [
        (*_who_they_are(row, int(number)), *has, f"{min(rank.free_shared_bytes for rank in row) / 2**30:.1f} GiB")
        for shape, rows in alike.items()
        for (number, *has), row in zip(shape, rows, strict=True)
    ]


def _who_they_are(row: Sequence[RankInventory], number: int) -> tuple[str, str, str]:
    nodes = {rank.node for rank in row}
    is_many = len(nodes) > 1
    groups = fold_numbers(rank.group for rank in row if rank.group is not None)
    return (
        f"{fold_names(rank.node for rank in row)}{f': {len(nodes)}' if is_many else ''}",
        f"{fold_numbers(rank.number for rank in row)}{f' ({number} each)' if is_many else ''}",
        groups or "servers",
    )


def _what_they_have(kind: Sequence[RankInventory]) -> tuple[str, str, str, str]:
    """Return cores, NUMA nodes, threads and device of the ranks of a node that have the same."""
    cores, own = frozenset[int]().union(*(rank.cores for rank in kind)), len(kind[0].cores)
    given = kind[0].cores_given
    texts = [str(len(cores))]
    if own < len(cores):
        texts.append(f"{own} each")
    if given is not None and given < len(cores):
        texts.append(f"{given} given")
    indices = [rank.gpu_index for rank in kind if rank.gpu_index is not None]
    return (
        ", ".join(texts),
        fold_numbers(number for rank in kind for number in rank.numa_nodes),
        str(kind[0].threads),
        f"{kind[0].device}{f' ({fold_numbers(indices)})' if indices else ''}",
    )


def _of_software(first: RankInventory) -> Iterator[str]:
    """Yield lines on the libraries and the launcher of rank 0."""
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
    yield f"launcher: {launcher_variables.launcher_name(os.environ)}{f', {job}' if job else ''}"


def _fault_tolerance(mpi: str, has: bool, is_on: bool) -> str:
    if not mpi_library.is_open_mpi(mpi):
        return "fault tolerance: none that hpcavg can use, which is Open MPI's"
    on = "switched on" if is_on else "not switched on (mpirun --with-ft ulfm)"
    return f"fault tolerance: the library {'has' if has else 'lacks'} it; {on}"


def _print(ranks: Sequence[RankInventory], lines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*HEADS)
    for row in table(ranks):
        shown.add_row(*row)
    console = Console(width=120, force_terminal=False, markup=False)
    console.print(shown)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
