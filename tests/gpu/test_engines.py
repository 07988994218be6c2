"""Every engine on real device arrays, with ranks that may share one GPU."""

import numpy as np
import pytest
import torch
from torch import nn

from hpcavg import Averager, Topology, algorithms
from hpcavg.algorithms.scope import GLOBAL, LOCAL
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine
from hpcavg.engines.gpu.cuda_support import find_cuda_awareness
from hpcavg.engines.gpu.nccl import NcclEngine, find_obstacle
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.select import ENGINES, select_engine, select_for_device
from hpcavg.engines.staged import StagedEngine
from hpcavg.machine.devices import choose_device

pytestmark = pytest.mark.mpi

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
SIZES = [1, 7, 64, 1009, 300_007]
NAMES = ["staged over mpi", "staged over shared", "cuda-aware", "nccl", "nccl over gloo"]
every_engine = pytest.mark.parametrize("name", NAMES)
# Some 50 ms on a GPU of any age: far longer than Python takes to reach MPI.
LONG_CYCLES = 100_000_000


def make(name, topology, device):
    """Return the engine called `name`; skip, saying why, where this machine cannot have it."""
    if name == "cuda-aware":
        is_aware, how = find_cuda_awareness(topology)
        if not is_aware:
            pytest.skip(how)
        return CudaAwareEngine(topology)
    if name == "nccl":
        obstacle = find_obstacle(topology, device)
        if obstacle is not None:
            pytest.skip(obstacle)
        return NcclEngine(topology, device)
    if name == "nccl over gloo":  # on device memory, too: several ranks of one GPU try the engine
        return NcclEngine(topology, device, backend="gloo")
    return StagedEngine(topology, ENGINES[name.rpartition(" ")[2]](topology))


def values_of_rank(rank, numel, dtype, learners):
    generator = torch.Generator().manual_seed(100 * numel + rank)
    values = torch.randn(learners, numel, generator=generator, dtype=torch.float64)
    return torch.complex(values, -values).to(dtype) if dtype.is_complex else values.to(dtype)


def mean_of_all(topology, numel, dtype, learners):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    rows = [values_of_rank(rank, numel, dtype, learners).to(wide) for rank in range(topology.num_learners)]
    return torch.cat(rows).mean(dim=0)


def assert_close(found, expected):
    assert found.is_cuda
    tolerance = 4 * torch.finfo(found.dtype).eps
    assert torch.allclose(found.cpu().to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@every_engine
@pytest.mark.parametrize("learners", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_those_of_a_float64_oracle(topology, device, name, dtype, learners):
    engine = make(name, topology, device)
    for numel in SIZES:
        own = values_of_rank(topology.rank, numel, dtype, learners).to(device)
        expected = mean_of_all(topology, numel, dtype, learners)
        rows = engine.allocate(own.clone())
        out = torch.empty_like(own[0])
        for _ in range(2):
            rows.copy_(own)
            engine.mean(rows, out, GLOBAL)
            assert torch.equal(rows, own)
            assert_close(out, expected)
        if learners == 1:
            engine.mean(rows, rows[0], GLOBAL)
            assert torch.equal(rows[0], out)
        rows.copy_(own)
        pending = engine.start([rows], GLOBAL)
        rows.zero_()
        assert_close(pending.wait()[0], expected)
        engine.mean(own, out, GLOBAL)  # not placed
        assert_close(out, expected)


@every_engine
def test_means_follow_one_another_without_a_wait(topology, device, name):
    engine = make(name, topology, device)
    rows = engine.allocate(torch.zeros(1, 2_000_003, device=device))
    local, overall = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
    members = topology.local.allgather(topology.rank)
    for repeat in range(20):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            rows.fill_(float(topology.rank + repeat))
            engine.mean(rows, local, LOCAL)
            engine.mean(rows, overall, GLOBAL)
            engine.mean(rows, local, LOCAL)
            assert (local == sum(members) / len(members) + repeat).all()
            assert (overall == (topology.num_learners - 1) / 2 + repeat).all()


@every_engine
@pytest.mark.parametrize("in_place", [True, False])
def test_a_kernel_queued_just_before_is_seen(topology, device, name, in_place):
    engine = make(name, topology, device)
    rows = engine.allocate(torch.zeros(1, 1009, device=device))
    out = rows[0] if in_place else torch.zeros_like(rows[0])
    expected = (topology.num_learners - 1) / 2
    torch.cuda._sleep(LONG_CYCLES)
    rows.fill_(float(topology.rank))
    engine.mean(rows, out, GLOBAL)
    assert (out == expected).all()
    torch.cuda._sleep(LONG_CYCLES)
    rows.fill_(float(topology.rank + 1))
    pending = engine.start([rows], GLOBAL)
    rows.fill_(-1.0)
    assert (pending.wait()[0] == expected + 1).all()


@every_engine
def test_what_is_queued_just_after_sees_the_mean(topology, device, name):
    engine = make(name, topology, device)
    rows = engine.allocate(torch.zeros(1, 5_000_011, device=device))
    for repeat in range(5):
        rows.fill_(float(topology.rank + repeat))
        engine.mean(rows, rows[0], GLOBAL)
        rows.mul_(2)
        engine.mean(rows, rows[0], GLOBAL)
        assert (rows == topology.num_learners - 1 + 2 * repeat).all()


@every_engine
def test_every_rank_gets_the_same_bits(topology, world, device, name):
    engine = make(name, topology, device)
    rows = engine.allocate(values_of_rank(topology.rank, 1009, torch.float32, 1).to(device))
    engine.mean(rows, rows[0], GLOBAL)
    assert len(set(world.allgather(rows.cpu().numpy().tobytes()))) == 1


def test_pinned_rows_are_pinned(topology, device):
    for host in ("mpi", "shared"):
        engine = StagedEngine(topology, ENGINES[host](topology))
        array = engine.allocate(torch.zeros(1, 100_003, device=device))
        (host_row,) = engine._host_rows.values()
        assert host_row.row.is_pinned()
        assert host_row.array is array


def test_engines_may_come_and_go(topology, device):
    """Memory that was page-locked in place is let go before it is unmapped, so that the next can be."""
    for repeat in range(5):
        engine = StagedEngine(topology, ENGINES["shared"](topology))
        rows = engine.allocate(torch.full((1, 1_000_003), float(topology.rank + repeat), device=device))
        engine.mean(rows, rows[0], GLOBAL)
        assert (rows == (topology.num_learners - 1) / 2 + repeat).all()
        del engine, rows


def test_auto_finds_an_engine(topology, device):
    engine, choice = select_for_device("auto", topology, device, lambda name: select_engine(name, topology))
    rows = engine.allocate(torch.zeros(1, 5, device=device))
    rows.fill_(float(topology.rank))
    engine.mean(rows, rows[0], GLOBAL)
    assert (rows == (topology.num_learners - 1) / 2).all()
    assert choice.engine == engine.name


# -- training -----------------------------------------------------------------------------------------------------


def train(world, monkeypatch, rule, device, make_engine):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double().to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    topology = Topology(world, min(2, world.Get_size()))
    engine = make_engine(topology)
    with monkeypatch.context() as patch:
        patch.setattr("hpcavg.averaging.averager.select_engine", lambda *arguments, **options: engine)
        averager = Averager(module, optimizer, rule, topology)
    for t in range(24):
        generator = torch.Generator().manual_seed(1000 * t + topology.rank)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(device)
        y = torch.randint(3, (8,), generator=generator).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        averager.step()
    averager.finish()
    values = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).cpu().numpy()
    topology.free()
    return values


@every_engine
@pytest.mark.parametrize(
    "rule", [algorithms.hier_avg(2, 6), algorithms.dasgd(4, 2, 0.25), algorithms.slowmo(3)], ids=lambda rule: rule.name
)
def test_training_on_the_device_is_training_on_the_cpu(world, topology, monkeypatch, name, rule):
    device = choose_device("cuda", topology.node_rank)
    found = train(world, monkeypatch, rule, device, lambda made: make(name, made, device))
    expected = train(world, monkeypatch, rule, torch.device("cpu"), MpiEngine)
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.array_equal(world.bcast(found), found)


# -- what MPI is given --------------------------------------------------------------------------------------------


@every_engine
def test_no_device_memory_reaches_a_non_blocking_collective(topology, device, name, monkeypatch):
    given = []

    class Watched:
        """A communicator that notes what it is asked to reduce in the background."""

        def __init__(self, comm):
            self._comm = comm

        def __getattr__(self, attribute):
            return getattr(self._comm, attribute)

        def Iallreduce(self, send, receive, op):
            given.append(receive)
            return self._comm.Iallreduce(send, receive, op)

    engine = make(name, topology, device)
    watched = Watched(topology.background_comm(GLOBAL))
    monkeypatch.setattr(topology, "background_comm", lambda scope, user=None: watched)
    rows = engine.allocate(torch.full((1, 1009), float(topology.rank), device=device))
    mean = engine.start([rows], GLOBAL).wait()[0]
    assert (mean == (topology.num_learners - 1) / 2).all()
    assert all(isinstance(values, np.ndarray) for values in given)
    assert bool(given) == (name == "staged over mpi")
