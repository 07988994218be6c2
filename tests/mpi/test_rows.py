"""Several learners in a rank: every mean is that of as many ranks with one learner each."""

import itertools
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch

from hpcavg import Topology
from hpcavg.algorithms.decentralized import exponential_graphs, ring_weights
from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours
from hpcavg.engines import neighbours
from hpcavg.engines.base import take_means, take_means_of_large, take_mixed
from hpcavg.engines.compression import wire_format
from hpcavg.engines.crossing import Crossing
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.select import ENGINES
from hpcavg.engines.shared import SharedEngine
from hpcavg.engines.twolevel import TwoLevelEngine
from tests.mpi.nodes import LAYOUTS, Nodes
from tests.mpi.pretend import PretendCuda
from tests.mpi.test_device_engines import MAKE
from tests.mpi.test_mean import CROSSINGS, Room
from tests.oracles import gossip

pytestmark = pytest.mark.mpi

# By MPI_Allreduce, in copies, in slices: the ways of `shared`.
SIZES = [0, 1, 300, 5000, 70_001]
CASES = [(torch.float64, (1, 5000, 70_001)), (torch.bfloat16, (300, 70_001)), (torch.complex64, (300, 40_001))]
OTHERS = {
    **{way: lambda topology, way=way: TwoLevelEngine(topology, crossing=Crossing.parse(way)) for way in CROSSINGS},
    **{name: lambda topology, make=make: make(topology, PretendCuda(eager=True)) for name, make in MAKE.items()},
}


def engines_on(topology):
    """Return every engine and way between nodes that these nodes allow, by name."""
    makers = {**ENGINES, **OTHERS}
    return {name: make(topology) for name, make in makers.items() if "shared" not in name or topology.num_nodes == 1}


@cache
def values_of(learner, numel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * numel + learner)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def values_here(topology, numel, dtype):
    return torch.stack([values_of(learner, numel, dtype) for learner in topology.learners])


def well_if_ones(num_well, mean):
    return num_well if (mean == 1).all() else None


def exact(values):
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def is_close(found, expected):
    """Half precision may be rounded twice, in the mean of a rank and in that of all."""
    tolerance = 2 * torch.finfo(found.dtype).eps
    return torch.allclose(exact(found), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=zip(LAYOUTS, (2, 3, 2, 3), strict=True), ids=str)
def several(world, request):
    """Yield topologies with several learners in a rank, in local groups of two ranks."""
    layout, learners_per_rank = request.param
    made = Nodes(world, min(2, world.Get_size()) * learners_per_rank, layout, learners_per_rank)
    yield made
    made.free()


@pytest.mark.parametrize(("dtype", "sizes"), CASES, ids=str)
def test_means_are_those_of_the_oracle(several, dtype, sizes):
    """Out of place, in place, on the way, and without the last learner."""
    size, (first, *_) = several.learners_per_rank, several.local.allgather(several.learners.start)
    members = {GLOBAL: range(several.num_learners), LOCAL: range(first, first + size * several.local.Get_size())}
    for (name, engine), numel in itertools.product(engines_on(several).items(), sizes):
        rows, values = engine.allocate(torch.zeros(size, numel, dtype=dtype)), values_here(several, numel, dtype)
        for scope, learners in members.items():
            case = name, numel, scope
            everyone = torch.stack([exact(values_of(learner, numel, dtype)) for learner in learners])
            rows.copy_(values)
            out = torch.empty_like(rows[0])
            engine.mean(rows, out, scope)
            assert is_close(out, everyone.mean(dim=0)), case
            assert torch.equal(rows, values), case
            engine.mean(rows, rows, scope)
            assert all(torch.equal(row, out) for row in rows), case
            rows.copy_(values)
            if scope is GLOBAL:
                (mean,) = engine.start([rows], scope).wait()
                assert is_close(mean, everyone.mean(dim=0)), case
            assert torch.equal(rows, values), case
            if learners[-1] in several.learners:
                rows[-1] = 0
            num_well = len(learners) - 1
            expected = everyone[:-1].sum(dim=0) / num_well
            if scope is GLOBAL:
                reports = engine.allocate(torch.ones(1, 3, dtype=torch.float64))
                reports.fill_(1.0)
                _, mean = engine.start([reports, rows], scope, partial(well_if_ones, num_well)).wait()
                assert is_close(mean, expected), case
            engine.mean(rows, rows, scope, num_well)
            assert all(is_close(row, expected) for row in rows), case


@pytest.mark.parametrize(("layout", "learners_per_rank"), [("one node", 4), ("nodes of 2", 6)])
def test_groups_inside_a_rank_have_means_of_their_own(world, layout, learners_per_rank):
    """Pairs of learners: j holds j + (0, 0.25, ...), and 2 i and 2 i + 1 have the mean 2 i + 0.5 + (0, 0.25, ...)."""
    topology = Nodes(world, 2, layout, learners_per_rank)
    for (name, engine), numel in itertools.product(engines_on(topology).items(), (1, 5000, 70_001)):
        offset = torch.arange(numel) / 4
        start = torch.stack([learner + offset for learner in topology.learners])
        rows = engine.allocate(torch.zeros_like(start))
        rows.copy_(start)
        for group in topology.groups_here:
            expected = topology.learners[group.start] + 0.5 + offset
            (mean,) = take_means(engine, [rows[group]], LOCAL, out_of_place=True)
            assert torch.equal(mean, expected), name
            assert torch.equal(rows[group], start[group]), name
            (mean,) = take_means(engine, [rows[group]], LOCAL)
            assert torch.equal(rows[group], torch.stack([expected, expected])), name
            assert mean.data_ptr() == rows[group].data_ptr()
        rows.fill_(3e38)
        for group in topology.groups_here:
            (mean,) = take_means_of_large(engine, [rows[group]], LOCAL, 2, None)
            assert (mean == 3e38).all(), name
    topology.free()


@pytest.mark.parametrize("num_learners", ["as many as ranks", 12])
def test_in_shared_memory_bits_do_not_depend_on_where_learners_are(node, num_learners):
    """The sum is in the order of the learners. With one learner in a rank, MPI has its own order up to 4 KiB."""
    total = node.Get_size() if isinstance(num_learners, str) else num_learners
    for num_ranks in (each for each in range(1, node.Get_size() + 1) if total % each == 0):
        part = node.Split(int(node.Get_rank() < num_ranks), node.Get_rank())
        if node.Get_rank() < num_ranks:
            topology = Topology(part, learners_per_rank=total // num_ranks)
            engine, size = SharedEngine(topology), topology.learners_per_rank
            for numel, dtype in itertools.product(
                SIZES if size > 1 else (5000, 70_001), (torch.float32, torch.bfloat16)
            ):
                expected = values_of(0, numel, dtype).float().numpy()
                for learner in range(1, total):
                    expected = expected + values_of(learner, numel, dtype).float().numpy()
                mean = torch.from_numpy(expected / np.float32(total)).to(dtype)
                rows, out = engine.allocate(torch.zeros(size, numel, dtype=dtype)), torch.empty(numel, dtype=dtype)
                rows.copy_(values_here(topology, numel, dtype))
                engine.mean(rows, out, GLOBAL)
                assert torch.equal(out, mean), (num_ranks, numel)
                assert torch.equal(engine.start([rows], GLOBAL).wait()[0], mean), (num_ranks, numel)
                engine.mean(rows, rows, GLOBAL)
                assert all(torch.equal(row, mean) for row in rows), (num_ranks, numel)
            topology.free()
        part.Free()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_means_of_neighbours_have_the_same_bits_wherever_the_learners_are(several, graph, dtype, monkeypatch):
    """The sum of each learner is in the order of its neighbours, in float32. It takes several messages and pieces."""
    monkeypatch.setattr(neighbours, "_MESSAGE_ELEMENTS", 500)
    monkeypatch.setattr(neighbours, "PIECE_ELEMENTS", 300)
    size, number = several.learners_per_rank, several.num_learners
    scopes = [Neighbours("ring", ring_weights)] if graph == "ring" else exponential_graphs(number)
    matrices = getattr(gossip, graph)(number)
    for (scope, matrix), numel in itertools.product(zip(scopes, matrices, strict=True), (1, 1207)):
        everyone = [values_of(learner, numel, dtype) for learner in range(number)]
        expected = []
        for learner in several.learners:
            total = torch.zeros(numel, dtype=torch.complex64 if dtype.is_complex else torch.float32)
            for weight, values in zip(matrix[learner], everyone, strict=True):
                if weight:
                    total += values.to(total.dtype) * np.float32(weight)
            expected.append(total.to(dtype))
        for name, engine in engines_on(several).items():
            rows = engine.allocate(torch.zeros(size, numel, dtype=dtype))
            rows.copy_(values_here(several, numel, dtype))
            (mixed,) = take_mixed(engine, [rows], scope, out_of_place=True)
            assert torch.equal(mixed, torch.stack(expected)), (name, numel)
            assert torch.equal(rows, values_here(several, numel, dtype)), (name, numel)
            (mixed,) = take_mixed(engine, [rows], scope)
            assert torch.equal(rows, torch.stack(expected)), (name, numel)
            assert mixed is rows


@pytest.mark.parametrize("error_feedback", [False, True])
def test_compressed_means_count_every_learner(several, error_feedback):
    """The first mean is exact; then each row changes by a hundredth, and the mean is off by the rounding of that."""
    engine = TwoLevelEngine(several, wire_format("bfloat16", error_feedback), crossing=Crossing.parse("chunks:2:60"))
    rows = engine.allocate(torch.zeros(several.learners_per_rank, 70_001))
    rows.copy_(values_here(several, 70_001, torch.float32))
    engine.mean(rows, rows, GLOBAL)
    mean = torch.stack([values_of(learner, 70_001) for learner in range(several.num_learners)]).mean(dim=0)
    for number in range(1, 4):
        changes = [0.01 * values_of(100 * number + learner, 70_001) for learner in range(several.num_learners)]
        rows.add_(torch.stack([changes[learner] for learner in several.learners]).float())
        mean = mean + torch.stack(changes).mean(dim=0)
        out = torch.empty(70_001)
        engine.mean(rows, out, GLOBAL)
        engine.mean(rows, rows, GLOBAL)
        assert torch.allclose(out.double(), mean, atol=3e-4, rtol=0)
        assert torch.allclose(rows.double(), mean.expand_as(rows), atol=3e-4, rtol=0)


@pytest.mark.parametrize("numel", [100, 70_001])
def test_without_room_means_go_by_mpi(several, monkeypatch, numel):
    engine = (SharedEngine if several.num_nodes == 1 else TwoLevelEngine)(several, is_required=False)
    rows, out = engine.allocate(torch.zeros(several.learners_per_rank, numel)), torch.empty(numel)
    room = Room(monkeypatch, several)
    room.fill()
    mean = (several.num_learners - 1) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            rows.copy_(torch.tensor([[float(learner)] for learner in several.learners]).expand_as(rows))
            assert (engine.start([rows], GLOBAL).wait()[0] == mean).all()
            engine.mean(rows, out, GLOBAL)
            assert (out == mean).all()
            engine.mean(rows, rows, GLOBAL)
            assert (rows == mean).all()


def test_float16_of_several_learners_is_summed_in_float32(world):
    topology = Topology(world, learners_per_rank=3)
    for name, engine in engines_on(topology).items():
        rows, out = engine.allocate(torch.zeros(3, 70, dtype=torch.float16)), torch.empty(70, dtype=torch.float16)
        rows.fill_(60_000.0)
        engine.mean(rows, out, GLOBAL)
        assert (out == 60_000).all(), name
        assert (engine.start([rows], GLOBAL).wait()[0] == 60_000).all(), name
    topology.free()


def test_chunks_of_mpi_reach_every_row(world):
    topology = Topology(world, learners_per_rank=2)
    rows = torch.stack([values_of(learner, 1009, torch.float32) for learner in topology.learners])
    parts = rows.clone()
    MpiEngine(topology).mean(rows, rows, GLOBAL)
    MpiEngine(topology, max_chunk_elements=5).mean(parts, parts, GLOBAL)
    assert torch.allclose(rows, parts, rtol=1e-5, atol=1e-6)
    assert torch.equal(parts[0], parts[1])
    topology.free()
