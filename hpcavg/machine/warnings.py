"""Warnings: what the ranks have that will hurt a run, and what helps. Pure functions of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from hpcavg.machine.inventory import RankInventory, RunNeeds, by_node
from hpcavg.utils.text import counted, fold_names, fold_numbers


def find_warnings(ranks: Sequence[RankInventory], needs: RunNeeds) -> list[str]:
    """Return a line for each thing that will hurt a run, and what helps: first of the job, then of nodes.

    Nodes with the same warning share a line.
    """
    troubled: dict[str, list[str]] = {}
    for node, members in by_node(ranks).items():
        for text in (*_gpus(members, needs), *_memory(members, needs), *_cores(members), *_numa(members)):
            troubled.setdefault(text, []).append(node)
    of_nodes = [f"{fold_names(nodes)}: {text}" for text, nodes in troubled.items()]
    of_all = (*_learners(ranks, needs), *_library(ranks, needs), *_versions(ranks), *_spread(ranks), *_files(needs))
    return [*of_all, *of_nodes]


def warn_of_learners(intended: int | None, learners: int) -> list[str]:
    """Return a line if the options are meant for another number of `learners`.

    Parameters
    ----------
    intended : int or None
        The number that the options are meant for; None if they do not say.
    learners : int
        The number that a run has.
    """
    if intended in (None, learners):
        return []
    return [f"the options are meant for {counted(intended, 'learner')}, not {learners}"]


# -- of the whole job ---------------------------------------------------------------------------------------------


def _learners(ranks: Sequence[RankInventory], needs: RunNeeds) -> Iterator[str]:
    yield from warn_of_learners(
        needs.intended_learners, sum(rank.num_learners for rank in ranks if rank.group is not None)
    )


def _library(ranks: Sequence[RankInventory], needs: RunNeeds) -> Iterator[str]:
    levels = {rank.thread_level for rank in ranks} - {"multiple"}
    if levels:
        yield (
            f"MPI gives thread level {' and '.join(sorted(levels))}, and hpcavg calls it from several threads: use a"
            " library built for MPI_THREAD_MULTIPLE, and do not set MPI4PY_RC_THREAD_LEVEL"
        )
    is_shrinking = needs.on_failure == "shrink"
    if is_shrinking and not all(rank.is_fault_tolerant for rank in ranks):
        cure = "start with mpirun --with-ft ulfm, which srun and jsrun cannot do"
        yield f"--on-failure shrink will be refused: {cure if _has_open_mpi(ranks) else 'it needs Open MPI'}"
    num_nodes = len({rank.node for rank in ranks})
    if num_nodes > 1 and not is_shrinking and any(rank.versions.get("messages by") == "ob1" for rank in ranks):
        yield (
            "messages between nodes go over TCP (Open MPI's ob1): if there is InfiniBand, use an MPI built with UCX"
            " and mpirun --mca pml ucx"
        )


def _versions(ranks: Sequence[RankInventory]) -> Iterator[str]:
    for name in dict.fromkeys(name for rank in ranks for name in rank.versions):
        nodes_of: dict[str, list[str]] = {}
        for rank in ranks:
            if name in rank.versions:
                nodes_of.setdefault(rank.versions[name], []).append(rank.node)
        if len(nodes_of) > 1:
            differing = "; ".join(f"{version} on {fold_names(nodes)}" for version, nodes in nodes_of.items())
            yield f"{name} is not the same everywhere: {differing}; let all nodes use one environment"


def _spread(ranks: Sequence[RankInventory]) -> Iterator[str]:
    nodes_of: dict[int, set[str]] = {}
    for rank in ranks:
        if rank.group is not None:
            nodes_of.setdefault(rank.group, set()).add(rank.node)
    torn = [group for group, nodes in nodes_of.items() if len(nodes) > 1]
    if torn:
        groups = f"local group {torn[0]} spans" if len(torn) == 1 else f"local groups {fold_numbers(torn)} span"
        yield (
            f"{groups} nodes, so local means cross the network: leave out --group-size, or let it divide the ranks of"
            " a node and number them node by node (mpirun --map-by slot, srun --distribution=block)"
        )
    numbers = Counter(len(members) for members in by_node(ranks).values())
    if len(numbers) > 1:
        listed = ", ".join(f"{number} on {counted(count, 'node')}" for number, count in sorted(numbers.items()))
        yield f"nodes have unequal numbers of ranks ({listed}), and the fullest sets the pace: --map-by ppr:N:node"


def _files(needs: RunNeeds) -> Iterator[str]:
    if needs.locked_file_system is not None:
        yield (
            f"HDF5_USE_FILE_LOCKING lets HDF5 lock files on {needs.locked_file_system}, which may fail or hang: unset"
            " it, or set it to FALSE"
        )


# -- of one node --------------------------------------------------------------------------------------------------


def _gpus(members: Sequence[RankInventory], needs: RunNeeds) -> Iterator[str]:
    used = Counter(rank.gpu for rank in members if rank.gpu is not None)
    visible = frozenset[str]().union(*(rank.visible_gpus for rank in members))
    num_on_gpus = sum(used.values())
    if num_on_gpus > len(used):
        cure = "start as many ranks as there are GPUs, or let every rank see all of them"
        yield f"{num_on_gpus} ranks compute on {counted(len(used), 'GPU')}: {cure}"
    num_idle = len(visible - set(used))
    if num_idle and needs.device != "cpu":
        yield f"{num_idle} of {counted(len(visible), 'GPU')} are idle: start {len(visible)} ranks on the node"
    num_there = max(rank.num_gpu_files for rank in members)
    if num_there and not visible and needs.device != "cpu":
        yield (
            f"{counted(num_there, 'GPU')} that torch does not see: ask the scheduler for them, and install a torch"
            " built for CUDA"
        )


def _memory(members: Sequence[RankInventory], needs: RunNeeds) -> Iterator[str]:
    wanted, free = needs.shared_bytes(len(members)), min(rank.free_shared_bytes for rank in members)
    if wanted > free:
        yield (
            f"the ranks share {_in_units(wanted)} of parameters, and /dev/shm has {_in_units(free)} free: enlarge it"
            " (a container's --shm-size), or take --engine mpi"
        )


def _cores(members: Sequence[RankInventory]) -> Iterator[str]:
    for cores, ranks in _islands(members):
        threads = sum(rank.threads for rank in ranks)
        if len(ranks) > len(cores):
            yield f"{len(ranks)} ranks share {counted(len(cores), 'core')}: start at most {len(cores)}"
        elif threads > len(cores):
            most = len(cores) // len(ranks)
            yield f"{threads} torch threads on {counted(len(cores), 'core')}: --threads {most} at most"
    given = min((rank.cores_given for rank in members if rank.cores_given is not None), default=None)
    if given is None:
        return
    num_cores = len(frozenset[int]().union(*(rank.cores for rank in members)))
    threads = sum(rank.threads for rank in members)
    if num_cores > given and threads > given:
        yield f"{threads} torch threads on the {given} cores that the job was given: fewer ranks, or --threads"
    if num_cores < given:
        num, share = len(members), given // len(members)
        flags = f"--map-by ppr:{num}:node:pe={share}" if _has_open_mpi(members) else f"-ppn {num} -bind-to core:{share}"
        yield (
            f"the ranks are bound to {num_cores} of the {given} cores that the job was given: mpirun {flags},"
            f" srun --cpus-per-task={share}"
        )


def _numa(members: Sequence[RankInventory]) -> Iterator[str]:
    spanning = [rank for rank in members if len(rank.numa_nodes) > 1]
    if spanning:
        who = "all ranks" if len(spanning) == len(members) else f"{len(spanning)} of {len(members)} ranks"
        flags = "--map-by ppr:1:numa --bind-to numa" if _has_open_mpi(members) else "-bind-to numa"
        yield (
            f"{who} may run on several of the {spanning[0].num_numa_nodes} NUMA nodes, far from their memory: bind a"
            f" rank or more to each (mpirun {flags}, srun --cpu-bind=ldoms)"
        )


def _islands(members: Iterable[RankInventory]) -> list[tuple[frozenset[int], list[RankInventory]]]:
    """Return disjoint sets of cores, and for each the ranks that may run on it and on no other."""
    islands: list[tuple[frozenset[int], list[RankInventory]]] = []
    for rank in members:
        joined = [island for island in islands if island[0] & rank.cores]
        cores = rank.cores.union(*(cores for cores, _ in joined))
        ranks = [*(other for _, others in joined for other in others), rank]
        islands = [*(island for island in islands if not island[0] & rank.cores), (cores, ranks)]
    return islands


def _has_open_mpi(ranks: Iterable[RankInventory]) -> bool:
    """Return whether the ranks use Open MPI, or no rank says: other libraries have other options."""
    return all(rank.versions.get("MPI", "Open MPI").startswith("Open MPI") for rank in ranks)


def _in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
