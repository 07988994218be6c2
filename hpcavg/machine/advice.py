"""What of the ranks' places will hurt a run, and what helps. Pure functions of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from hpcavg.machine.place import Place, Plan, by_node
from hpcavg.utils.text import fold_names, fold_numbers


def warnings(places: Sequence[Place], plan: Plan) -> list[str]:
    """Return one line for everything that will hurt, with what helps: first of the whole job, then of nodes.

    Nodes with the same trouble share a line.
    """
    troubled: dict[str, list[str]] = {}
    for node, members in by_node(places).items():
        for text in (*_gpus(members, plan), *_memory(members, plan), *_cores(members), *_numa(members)):
            troubled.setdefault(text, []).append(node)
    of_nodes = [f"{fold_names(nodes)}: {text}" for text, nodes in troubled.items()]
    of_all = (*_learners(places, plan), *_library(places, plan), *_versions(places), *_spread(places), *_files(plan))
    return [*of_all, *of_nodes]


def of_learners(intended: int | None, learners: int) -> list[str]:
    """Return a line where the options are meant for another number of learners; None: nobody says for how many."""
    if intended in (None, learners):
        return []
    return [f"the options are meant for {_counted(intended, 'learner')}, not {learners}"]


# -- of the whole job ---------------------------------------------------------------------------------------------


def _learners(places: Sequence[Place], plan: Plan) -> Iterator[str]:
    yield from of_learners(plan.intended_learners, sum(place.group is not None for place in places))


def _library(places: Sequence[Place], plan: Plan) -> Iterator[str]:
    levels = {place.thread_level for place in places} - {"multiple"}
    if levels:
        yield (
            f"MPI gives thread level {' and '.join(sorted(levels))}, and hpcavg calls it from several threads: use a"
            " library built for MPI_THREAD_MULTIPLE, and do not set MPI4PY_RC_THREAD_LEVEL"
        )
    is_shrinking = plan.on_failure == "shrink"
    if is_shrinking and not all(place.is_fault_tolerant for place in places):
        cure = "start with mpirun --with-ft ulfm, which srun and jsrun cannot do"
        yield f"--on-failure shrink will be refused: {cure if _has_open_mpi(places) else 'it needs Open MPI'}"
    num_nodes = len({place.node for place in places})
    if num_nodes > 1 and not is_shrinking and any(place.versions.get("messages by") == "ob1" for place in places):
        yield (
            "messages between nodes go over TCP (Open MPI's ob1): where there is InfiniBand, use an MPI built with UCX"
            " and mpirun --mca pml ucx"
        )


def _versions(places: Sequence[Place]) -> Iterator[str]:
    for name in dict.fromkeys(name for place in places for name in place.versions):
        nodes_of: dict[str, list[str]] = {}
        for place in places:
            if name in place.versions:
                nodes_of.setdefault(place.versions[name], []).append(place.node)
        if len(nodes_of) > 1:
            differing = "; ".join(f"{version} on {fold_names(nodes)}" for version, nodes in nodes_of.items())
            yield f"{name} is not the same everywhere: {differing}; let all nodes use one environment"


def _spread(places: Sequence[Place]) -> Iterator[str]:
    nodes_of: dict[int, set[str]] = {}
    for place in places:
        if place.group is not None:
            nodes_of.setdefault(place.group, set()).add(place.node)
    torn = [group for group, nodes in nodes_of.items() if len(nodes) > 1]
    if torn:
        groups = f"local group {torn[0]} spans" if len(torn) == 1 else f"local groups {fold_numbers(torn)} span"
        yield (
            f"{groups} nodes, so local means cross the network: leave out --group-size, or let it divide the ranks of"
            " a node and number them node by node (mpirun --map-by slot, srun --distribution=block)"
        )
    numbers = Counter(len(members) for members in by_node(places).values())
    if len(numbers) > 1:
        counted = ", ".join(f"{number} on {_counted(count, 'node')}" for number, count in sorted(numbers.items()))
        yield f"nodes have unequal numbers of ranks ({counted}), and the fullest sets the pace: --map-by ppr:N:node"


def _files(plan: Plan) -> Iterator[str]:
    if plan.locked_file_system is not None:
        yield (
            f"HDF5_USE_FILE_LOCKING lets HDF5 lock files on {plan.locked_file_system}, which may fail or hang: unset"
            " it, or set it to FALSE"
        )


# -- of one node --------------------------------------------------------------------------------------------------


def _gpus(members: Sequence[Place], plan: Plan) -> Iterator[str]:
    used = Counter(place.gpu for place in members if place.gpu is not None)
    visible = frozenset[str]().union(*(place.visible_gpus for place in members))
    num_on_gpus = sum(used.values())
    if num_on_gpus > len(used):
        cure = "start as many ranks as there are GPUs, or let every rank see all of them"
        yield f"{num_on_gpus} ranks compute on {_counted(len(used), 'GPU')}: {cure}"
    num_idle = len(visible - set(used))
    if num_idle and plan.device != "cpu":
        yield f"{num_idle} of {_counted(len(visible), 'GPU')} are idle: start {len(visible)} ranks on the node"
    num_there = max(place.num_gpu_files for place in members)
    if num_there and not visible and plan.device != "cpu":
        yield (
            f"{_counted(num_there, 'GPU')} that torch does not see: ask the scheduler for them, and install a torch"
            " built for CUDA"
        )


def _memory(members: Sequence[Place], plan: Plan) -> Iterator[str]:
    wanted, free = plan.shared_bytes(len(members)), min(place.shared_bytes for place in members)
    if wanted > free:
        yield (
            f"the ranks share {_in_units(wanted)} of parameters, and /dev/shm has {_in_units(free)} free: enlarge it"
            " (a container's --shm-size), or take --engine mpi"
        )


def _cores(members: Sequence[Place]) -> Iterator[str]:
    for cores, ranks in _islands(members):
        threads = sum(place.threads for place in ranks)
        if len(ranks) > len(cores):
            yield f"{len(ranks)} ranks share {_counted(len(cores), 'core')}: start at most {len(cores)}"
        elif threads > len(cores):
            most = len(cores) // len(ranks)
            yield f"{threads} torch threads on {_counted(len(cores), 'core')}: --threads {most} at most"
    given = min((place.given for place in members if place.given is not None), default=None)
    if given is None:
        return
    num_cores = len(frozenset[int]().union(*(place.cores for place in members)))
    threads = sum(place.threads for place in members)
    if num_cores > given and threads > given:
        yield f"{threads} torch threads on the {given} cores that the job was given: fewer ranks, or --threads"
    if num_cores < given:
        num, share = len(members), given // len(members)
        flags = f"--map-by ppr:{num}:node:pe={share}" if _has_open_mpi(members) else f"-ppn {num} -bind-to core:{share}"
        yield (
            f"the ranks are bound to {num_cores} of the {given} cores that the job was given: mpirun {flags},"
            f" srun --cpus-per-task={share}"
        )


def _numa(members: Sequence[Place]) -> Iterator[str]:
    spanning = [place for place in members if len(place.numa_nodes) > 1]
    if spanning:
        who = "all ranks" if len(spanning) == len(members) else f"{len(spanning)} of {len(members)} ranks"
        flags = "--map-by ppr:1:numa --bind-to numa" if _has_open_mpi(members) else "-bind-to numa"
        yield (
            f"{who} may run on several of the {spanning[0].num_numa_nodes} NUMA nodes, far from their memory: bind a"
            f" rank or more to each (mpirun {flags}, srun --cpu-bind=ldoms)"
        )


def _islands(members: Iterable[Place]) -> list[tuple[frozenset[int], list[Place]]]:
    """Return sets of cores that no two ranks of different sets share, and who runs on each."""
    islands: list[tuple[frozenset[int], list[Place]]] = []
    for place in members:
        joined = [island for island in islands if island[0] & place.cores]
        cores = place.cores.union(*(cores for cores, _ in joined))
        ranks = [*(other for _, others in joined for other in others), place]
        islands = [*(island for island in islands if not island[0] & place.cores), (cores, ranks)]
    return islands


def _has_open_mpi(places: Iterable[Place]) -> bool:
    """Return whether its mpirun is the one to advise on: others have other options."""
    return all(place.versions.get("MPI", "Open MPI").startswith("Open MPI") for place in places)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
