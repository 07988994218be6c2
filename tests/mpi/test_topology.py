"""Groups and communicators."""

import os

import numpy as np
import pytest
from mpi4py import MPI

from hpcavg import InputError, Topology
from hpcavg.algorithms.scope import GLOBAL, LOCAL
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
    # `cross` joins those with this learner's place in their own group, in order of the groups
    assert topology.comm(LOCAL) is topology.local
    assert topology.comm(GLOBAL) is topology.learner_ranks
    topology.free()


def test_without_a_size_groups_are_nodes(world):
    topology = Topology(world)
    assert topology.local.Get_size() == topology.node.Get_size()
    assert topology.num_groups == topology.num_nodes == len(set(world.allgather(os.uname().nodename)))
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
