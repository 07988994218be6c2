"""Engines for device arrays, with ordinary memory in place of the device's: what goes where, in which order."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.torch_peers import gloo
from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.algorithms.scope import GLOBAL, LOCAL
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine
from hpcavg.engines.gpu.cuda_support import OVERRIDE, ask_here, find_cuda_awareness
from hpcavg.engines.gpu.nccl import NcclEngine, find_obstacle
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.select import ENGINES, find_facts, select_engine, select_for_device
from hpcavg.engines.staged import StagedEngine
from tests.mpi.pretend import PretendCuda
from tests.mpi.problems import Logistic, values_of
from tests.mpi.test_mean import DTYPES, SIZES, everyone, rows_of

pytestmark = pytest.mark.mpi

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def world(node):
    """Return the ranks of one node: half of these engines work on one only, so on a cluster every node tests them."""
    return node


@pytest.fixture
def topology(world):
    made = Topology(world, min(2, world.Get_size()))
    yield made
    made.free()


MAKE = {
    "staged over mpi": lambda topology, cuda: StagedEngine(topology, ENGINES["mpi"](topology), cuda),
    "staged over shared": lambda topology, cuda: StagedEngine(topology, ENGINES["shared"](topology), cuda),
    "cuda-aware": lambda topology, cuda: CudaAwareEngine(topology, cuda=cuda),
    # The calls to CUDA are torch's own: on ordinary memory it takes another library.
    "nccl over gloo": lambda topology, cuda: NcclEngine(topology, CPU, backend="gloo"),
}
every_engine = pytest.mark.parametrize("name", MAKE)


def own_and_expected(topology, numel, dtype, learners=1):
    if not dtype.is_complex:
        expected = everyone(topology, numel, dtype, learners).mean(dim=0)
        return rows_of(topology.rank, numel, dtype, learners), expected
    values = rows_of(topology.rank, numel, torch.float32, learners)
    expected = everyone(topology, numel, torch.float32, learners).mean(dim=0)
    return torch.complex(values, values), torch.complex(expected, expected)


@every_engine
@pytest.mark.parametrize("learners", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_of_any_size_and_dtype(topology, name, dtype, learners):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    tolerance = 4 * torch.finfo(dtype).eps
    for numel in SIZES:
        own, expected = own_and_expected(topology, numel, dtype, learners)
        rows = engine.allocate(own.clone())
        assert rows.shape == own.shape
        out = torch.empty_like(own[0])
        for _ in range(2):  # the second time the same host memory is used again
            rows.copy_(own)
            engine.mean(rows, out, GLOBAL)
            cuda.synchronize(CPU)
            assert torch.equal(rows, own)
            assert torch.allclose(out.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
        engine.mean(rows, rows, GLOBAL)
        cuda.synchronize(CPU)
        assert all(torch.equal(row, out) for row in rows)
        unplaced = own.clone()
        engine.mean(unplaced, out, GLOBAL)
        cuda.synchronize(CPU)
        assert torch.allclose(out.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


@every_engine
def test_local_means_are_over_the_group_and_follow_one_another_without_a_wait(topology, name):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    rows, local, overall = engine.allocate(torch.zeros(1, 10_007)), torch.zeros(10_007), torch.zeros(10_007)
    members = topology.local.allgather(topology.rank)
    for repeat in range(5):
        rows.fill_(float(topology.rank + repeat))
        engine.mean(rows, local, LOCAL)
        engine.mean(rows, overall, GLOBAL)
        engine.mean(rows, local, LOCAL)
        cuda.synchronize(CPU)
        assert (local == sum(members) / len(members) + repeat).all()
        assert (overall == (topology.num_learners - 1) / 2 + repeat).all()


@every_engine
def test_a_mean_in_another_stream_does_not_spoil_the_last(topology, name):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    rows = engine.allocate(torch.zeros(1, 1009))
    outs = [torch.zeros(1009) for _ in range(4)]
    streams = []
    for repeat, out in enumerate(outs):
        cuda.new_stream()
        streams.append(cuda.stream)
        rows.fill_(float(topology.rank + repeat))
        engine.mean(rows, out, GLOBAL)
    topology.learner_ranks.Barrier()
    for repeat, (out, stream) in enumerate(zip(outs, streams, strict=True)):
        stream.run(stream.place)
        assert (out == (topology.num_learners - 1) / 2 + repeat).all()


@every_engine
def test_every_rank_gets_the_same_bits(topology, world, name):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    rows = engine.allocate(torch.zeros(1, 1009))
    rows.copy_(rows_of(topology.rank, 1009, torch.float32))
    engine.mean(rows, rows[0], GLOBAL)
    cuda.synchronize(CPU)
    assert len(set(world.allgather(rows.numpy().tobytes()))) == 1


@every_engine
@pytest.mark.parametrize("learners", [1, 3])
def test_delayed_means_are_of_what_was_there_at_the_start(topology, name, learners):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    forms = [(7, torch.float32), (300, torch.float16), (64, torch.bfloat16)]
    values = [own_and_expected(topology, numel, dtype, learners) for numel, dtype in forms]
    arrays = [engine.allocate(own.clone()) for own, _ in values[:2]] + [values[2][0].clone()]
    for array, (own, _) in zip(arrays, values, strict=True):
        array.copy_(own)
    pending = engine.start(arrays, GLOBAL)
    for array in arrays:
        array.fill_(-1.0)
    out = torch.empty_like(arrays[0][0])
    engine.mean(arrays[0], out, GLOBAL)  # meanwhile
    cuda.synchronize(CPU)
    assert (out == -1).all()
    means = pending.wait()
    assert pending.test()
    assert pending.done_s > 0
    for array, mean, (own, expected) in zip(arrays, means, values, strict=True):
        assert (array == -1).all()
        tolerance = 4 * torch.finfo(own.dtype).eps
        assert torch.allclose(mean.double(), expected, rtol=tolerance, atol=tolerance)


@every_engine
@pytest.mark.parametrize("learners", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_learners_that_are_left_out_are_not_counted(topology, name, learners, dtype):
    """Those of the last rank: at once by their number, on the way by what the first array tells of it."""
    cuda, size = PretendCuda(eager=True), topology.num_learners
    engine = MAKE[name](topology, cuda)
    is_ill = topology.rank == size - 1 and size > 1
    num_well = learners * (size - 1) if size > 1 else None
    rows, complaints = engine.allocate(torch.zeros(learners, 1009, dtype=dtype)), engine.allocate(torch.zeros(1, 5))
    rows.fill_(0.0 if is_ill else 1.171875)
    complaints.fill_(float(is_ill))
    out = torch.empty(1009, dtype=dtype)
    engine.mean(rows, out, GLOBAL, num_well)
    cuda.synchronize(CPU)
    assert (out == 1.171875).all()
    told = []

    def count_well(mean):
        told.append(mean.tolist())
        return num_well if mean.any() else None

    _, mean = engine.start([complaints, rows], GLOBAL, count_well).wait()
    assert (mean == 1.171875).all()
    assert told == [pytest.approx([(size > 1) / size] * 5)]


@pytest.mark.parametrize("name", ["staged over mpi", "staged over shared"])
def test_staged_rows_are_allocated_once(topology, name):
    cuda = PretendCuda()
    engine = MAKE[name](topology, cuda)
    rows = engine.allocate(torch.ones(1, 100))
    made = (len(cuda.locked), cuda.num_pinned)
    assert made == ((1, 1) if "mpi" in name else (1, 0))
    for scope in (GLOBAL, LOCAL) * 3:
        engine.mean(rows, rows[0], scope)
    engine.start([rows], GLOBAL).wait()
    assert (len(cuda.locked), cuda.num_pinned) == made


def test_arrays_in_host_memory_go_to_the_host_engine_as_they_are(topology):
    cuda = PretendCuda()
    host = ENGINES["shared"](topology)
    engine = StagedEngine(topology, host, cuda)
    cuda.holds = lambda array: False
    rows = engine.allocate(torch.zeros(1, 5))
    rows.fill_(float(topology.rank))
    engine.mean(rows, rows[0], GLOBAL)
    assert (rows == (topology.num_learners - 1) / 2).all()
    assert (engine.start([rows], GLOBAL).wait()[0] == (topology.num_learners - 1) / 2).all()
    assert cuda.locked == []
    assert cuda.stream.queued == []


def test_the_blocking_mean_waits_for_the_stream_before_mpi_looks(topology):
    """A kernel queued just before is seen: here a copy that takes place only when the stream is synchronised."""
    for name in ("staged over mpi", "staged over shared", "cuda-aware"):
        cuda = PretendCuda()
        engine = MAKE[name](topology, cuda)
        rows = engine.allocate(torch.zeros(1, 9))
        cuda.copy(rows[0], torch.full((9,), float(topology.rank)))
        engine.mean(rows, rows[0], GLOBAL)
        cuda.synchronize(CPU)
        assert (rows == (topology.num_learners - 1) / 2).all()


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_reach_every_element(topology, chunk, dtype):
    engine = CudaAwareEngine(topology, max_chunk_elements=chunk, cuda=PretendCuda())
    for numel in SIZES:
        own, expected = own_and_expected(topology, numel, dtype)
        engine.mean(own, own[0], GLOBAL)
        tolerance = 4 * torch.finfo(dtype).eps
        assert torch.allclose(own[0].double(), expected, rtol=tolerance, atol=tolerance)


def test_blocking_means_are_taken_in_one_thread_in_a_stream_of_its_own(topology):
    cuda = PretendCuda()
    engine = CudaAwareEngine(topology, cuda=cuda)
    pending = [engine.start([torch.full((1, 5), float(topology.rank + i))], GLOBAL) for i in range(10)]
    for i, mean in enumerate(pending):
        assert (mean.wait()[0] == (topology.num_learners - 1) / 2 + i).all()
    assert cuda.in_own_stream == 10
    assert len([thread for thread in threading.enumerate() if thread.name == "hpcavg blocking means"]) == 1


# -- training -----------------------------------------------------------------------------------------------------


def train(world, monkeypatch, rule, make_engine):
    problem = Logistic(world.Get_size())
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    topology = Topology(world, min(2, world.Get_size()))
    engine = make_engine(topology)
    monkeypatch.setattr("hpcavg.averaging.averager.select_engine", lambda *arguments, **options: engine)
    averager = Averager(module, optimizer, rule, topology)
    for t in range(1, 20):
        optimizer.zero_grad()
        problem.loss(module, world.Get_rank(), t).backward()
        averager.step()
    averager.finish()
    values = values_of(module)
    topology.free()
    return values


@every_engine
@pytest.mark.parametrize(
    "rule", [algorithms.hier_avg(2, 6), algorithms.dasgd(4, 2, 0.25), algorithms.slowmo(3)], ids=lambda rule: rule.name
)
def test_training_on_a_device_is_training_on_the_cpu(world, monkeypatch, name, rule):
    found = train(world, monkeypatch, rule, lambda topology: MAKE[name](topology, PretendCuda(eager=True)))
    expected = train(world, monkeypatch, rule, MpiEngine)
    assert np.allclose(found, expected, rtol=1e-12, atol=1e-12)


# -- what the machine can do --------------------------------------------------------------------------------------


class Gpus(PretendCuda):
    """Every rank has the GPU of this name."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def identity(self, device):
        return self.name


@pytest.fixture
def has_nccl(monkeypatch):
    monkeypatch.setattr("hpcavg.engines.gpu.nccl.distributed.is_nccl_available", lambda: True)


@pytest.mark.usefixtures("has_nccl")
def test_nccl_needs_a_gpu_for_every_rank(topology):
    own = Gpus(f"GPU-{topology.rank}")
    assert find_obstacle(topology, CPU, own) is None
    facts = find_facts("nccl", topology, torch.device("cuda", 0), own)
    assert facts.nccl_obstacle is None


@pytest.mark.usefixtures("has_nccl")
def test_a_gpu_that_two_ranks_share_is_known_to_all(topology):
    """The last two ranks: with one rank there is nobody to share with."""
    last = topology.num_learners - 1
    shared = Gpus(f"GPU-{min(topology.rank, last - 1)}")
    expected = f"ranks {last - 1} and {last} share a GPU, which NCCL refuses" if last else None
    assert find_obstacle(topology, CPU, shared) == expected


def test_a_torch_without_nccl_on_one_rank_is_known_to_all(topology, monkeypatch):
    is_last = topology.rank == topology.num_learners - 1
    monkeypatch.setattr("hpcavg.engines.gpu.nccl.distributed.is_nccl_available", lambda: not is_last)
    assert find_obstacle(topology, CPU, Gpus(f"GPU-{topology.rank}")) == "this torch has no NCCL"


def test_the_process_groups_are_the_engines_own(topology, world):
    """A program's default process group is not touched, and two engines do not meet in one group."""
    engines = [NcclEngine(topology, CPU, backend="gloo") for _ in range(2)]
    rows = [torch.full((1, 5), float(topology.rank + index)) for index in range(2)]
    pending = [engine.start([own], GLOBAL) for engine, own in zip(engines, rows, strict=True)]
    for index in range(2) if topology.rank == 0 else (1, 0):
        assert (pending[index].wait()[0] == (topology.num_learners - 1) / 2 + index).all()
    assert not torch.distributed.is_initialized()
    with gloo(topology):
        torch.distributed.all_reduce(rows[0])
        engines[0].mean(rows[1], rows[1][0], GLOBAL)
    assert (rows[0] == world.Get_size() * (world.Get_size() - 1) / 2).all()
    assert (rows[1] == (topology.num_learners + 1) / 2).all()
    assert not torch.distributed.is_initialized()


def test_process_groups_end_with_the_topology(world):
    """Their threads, too: a rank that ends must not leave others waiting for it."""
    before = num_threads()
    topology = Topology(world, 1)
    engine = NcclEngine(topology, CPU, backend="gloo")
    rows = torch.ones(1, 5)
    for scope in (GLOBAL, LOCAL):
        engine.mean(rows, rows[0], scope)
        engine.start([rows], scope).wait()
    assert num_threads() > before
    topology.free()
    assert num_threads() <= before + 1  # the thread of pending means stays


def num_threads():
    return len(os.listdir("/proc/self/task"))


def test_the_wheels_open_mpi_says_that_it_takes_host_memory_only(topology, monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)
    is_aware, how = find_cuda_awareness(topology)
    assert how in ("MPIX_Query_cuda_support says 0", "MPIX_Query_cuda_support says 1") or how.startswith("no MPIX")
    assert is_aware == how.endswith("1")


def test_cuda_awareness_of_a_library_that_cannot_be_asked(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr("hpcavg.engines.gpu.cuda_support.ctypes.CDLL", lambda path: SimpleNamespace())
    assert ask_here() == (False, "no MPIX_Query_cuda_support in this MPI library")
    query = SimpleNamespace(MPIX_Query_cuda_support=lambda: 1)
    monkeypatch.setattr("hpcavg.engines.gpu.cuda_support.ctypes.CDLL", lambda path: query)
    assert ask_here() == (True, "MPIX_Query_cuda_support says 1")


def test_the_environment_has_the_last_word_and_ranks_agree(topology, monkeypatch):
    for value in (0, 1):
        monkeypatch.setenv(OVERRIDE, str(value))
        assert find_cuda_awareness(topology) == (bool(value), f"HPCAVG_CUDA_AWARE={value}")
    last = topology.num_learners - 1
    monkeypatch.setenv(OVERRIDE, "0" if topology.rank == last else "1")
    how = "HPCAVG_CUDA_AWARE=0" + (f" on rank {last}" if last else "")
    assert find_cuda_awareness(topology) == (False, how)
    monkeypatch.setenv(OVERRIDE, "yes" if topology.rank == last else "1")
    with pytest.raises(InputError, match="HPCAVG_CUDA_AWARE='yes': must be 0 or 1"):
        find_cuda_awareness(topology)


def test_engines_for_arrays_on_the_cpu_are_those_of_the_host(topology):
    def make(name):
        return select_engine(name, topology)

    for requested in ("auto", "mpi", "shared"):
        engine, choice = select_for_device(requested, topology, CPU, make)
        assert engine.name == select_engine(requested, topology).name
        assert choice.reason == "the parameters are on cpu"
    for requested in ("staged", "cuda-aware", "nccl"):
        with pytest.raises(InputError, match="one of auto, mpi, shared, twolevel for parameters on cpu"):
            select_for_device(requested, topology, CPU, make)


def test_devices_must_be_of_one_kind(topology):
    device = torch.device("cuda", 0) if topology.rank == topology.num_learners - 1 else CPU
    if topology.num_learners > 1:
        with pytest.raises(InputError, match="'cpu on rank 0 and not on rank"):
            find_facts("auto", topology, device)
