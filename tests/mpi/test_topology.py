"""Groups and communicators."""

import os

import numpy as np
import pytest
from mpi4py import MPI

from hpcavg import InputError, Topology
from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours
from hpcavg.distributed.shared_memory import share_array
from hpcavg.machine.cores import num_threads
from tests.mpi.nodes import shared_files

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8])
def test_consecutive_groups_of_any_size(world, group_size):
    rank, size = world.Get_rank(), world.Get_size()
    group_size = min(group_size, size)
    topology = Topology(world, group_size)
    members = [j for j in range(size) if j // group_size == rank // group_size]
    assert topology.local.allgather(rank) == members
    assert topology.group == rank // group_size
    assert topology.num_groups == -(-size // group_size)
    assert sum(topology.group_sizes.values()) == size
    assert topology.group_sizes[members[0]] == len(members)
    assert topology.comm(LOCAL) is topology.local
    assert topology.comm(GLOBAL) is topology.learner_ranks
    topology.free()


def test_without_a_size_groups_are_nodes(world):
    topology = Topology(world)
    assert topology.local.Get_size() == topology.node.Get_size()
    assert topology.num_groups == topology.num_nodes == len(set(world.allgather(os.uname().nodename)))
    topology.free()


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 12, None])
def test_groups_of_learners_lie_inside_a_rank_or_span_whole_ranks(node, group_size):
    """Four learners in a rank: consecutive learners form a group, wherever they are; None is all of a node."""
    rank, size, num_learners = node.Get_rank(), node.Get_size(), 4 * node.Get_size()
    given, group_size = group_size, min(group_size or num_learners, num_learners)
    topology = Topology(node, None if given is None else group_size, learners_per_rank=4)
    assert (topology.num_learners, topology.num_learner_ranks) == (num_learners, size)
    assert list(topology.learners) == [4 * rank, 4 * rank + 1, 4 * rank + 2, 4 * rank + 3]
    assert [topology.rank_of(learner) for learner in topology.learners] == [rank] * 4
    starts = range(0, num_learners, group_size)
    assert topology.group_sizes == {first: min(group_size, num_learners - first) for first in starts}
    assert topology.num_groups == len(starts)
    assert topology.group == 4 * rank // group_size
    assert topology.groups_here == [slice(first, first + min(group_size, 4)) for first in range(0, 4, group_size)]
    ranks = {learner // 4 for learner in range(num_learners) if learner // group_size == 4 * rank // group_size}
    assert topology.local.allgather(rank) == sorted(ranks)
    topology.free()


@pytest.mark.parametrize(
    ("group_size", "learners_per_rank", "message"),
    [
        (3, 4, "group_size=3: must be a multiple or a divisor of learners_per_rank, 4"),
        (4, 6, "group_size=4: must be a multiple or a divisor of learners_per_rank, 6"),
        (2, 0, "learners_per_rank=0: must be an integer"),
        (None, 1.5, "learners_per_rank=1.5: must be an integer"),
        (1000, 8, "group_size=1000: must be an integer of at least 1 and at most"),
    ],
)
def test_sizes_that_do_not_fit_the_learners_of_a_rank_are_refused(world, group_size, learners_per_rank, message):
    with pytest.raises(InputError, match=message):
        Topology(world, group_size, learners_per_rank=learners_per_rank)


def test_links_between_ranks_with_two_learners(world):
    """Each learner takes from the one before it: the second of a rank from the first, the first from another rank."""
    rank, size = world.Get_rank(), world.Get_size()
    topology = Topology(world, learners_per_rank=2)
    scope = Neighbours("hop 1", lambda learner, n: {learner: 0.75, (learner - 1) % n: 0.25})
    links = topology.links(scope)
    before, after = (2 * rank - 1) % (2 * size), (rank + 1) % size
    assert links.weights == ({2 * rank: 0.75, before: 0.25}, {2 * rank: 0.25, 2 * rank + 1: 0.75})
    assert list(links.weights[0]) == sorted(links.weights[0])
    assert links.sources == ({before // 2: [before]} if size > 1 else {})
    assert links.targets == ({after: [2 * rank + 1]} if size > 1 else {})
    assert topology.ranks_of(scope) == sorted({(rank - 1) % size, rank, after})
    topology.free()


@pytest.mark.parametrize("comm", [MPI.COMM_SELF, MPI.COMM_WORLD], ids=["self", "world"])
def test_the_callers_communicator_is_duplicated(comm):
    topology = Topology(comm)
    assert MPI.Comm.Compare(topology.learner_ranks, comm) == MPI.CONGRUENT
    assert topology.num_learners == comm.Get_size()
    topology.free()
    topology.free()
    comm.Barrier()


@pytest.mark.parametrize("group_size", [0, -1, 1000, 1.5])
def test_group_sizes_out_of_range_are_refused(world, group_size):
    with pytest.raises(InputError, match=f"group_size={group_size}"):
        Topology(world, group_size)


def test_one_ranks_error_is_raised_on_all(world):
    last = world.Get_size() - 1

    def action():
        if world.Get_rank() == last:
            raise InputError("task", "x", "y")
        return 1

    topology = Topology(world)
    with pytest.raises(InputError, match="task='x'"):
        topology.run_on_all_ranks(action)
    assert topology.run_on_all_ranks(lambda: world.Get_rank()) == world.Get_rank()
    topology.free()


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (1000,)])
def test_an_array_is_shared_by_the_ranks_of_a_node(node, shape):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    shared = share_array(node, values if node.Get_rank() == 0 else None)
    assert shared.shape == shape
    assert np.array_equal(shared, values)
    node.Barrier()
    if shared.size and node.Get_rank() == node.Get_size() - 1:
        shared[...] = -1
    node.Barrier()
    assert (shared == -1).all()
    assert shared_files(node) == []


def test_threads_are_the_ranks_share_of_its_cores(world, monkeypatch):
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "LSB_MCPU_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    assert num_threads(world) == max(1, cores // world.Get_size())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert num_threads(world) == 1
