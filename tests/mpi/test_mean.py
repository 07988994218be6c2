"""Engines: the same mean whatever the size, dtype and chunking."""

import re
import time
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mpi4py import MPI

from hpcavg import InputError, Topology
from hpcavg.algorithms.scope import GLOBAL, LOCAL
from hpcavg.distributed import shared_memory
from hpcavg.engines import small, twolevel
from hpcavg.engines.compression import wire_format
from hpcavg.engines.crossing import CHUNKS, Crossing, size_class
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.select import ENGINES, select_engine
from hpcavg.engines.shared import SharedEngine
from hpcavg.engines.twolevel import TwoLevelEngine
from tests.mpi.nodes import TRIED, Nodes, shared_files

pytestmark = pytest.mark.mpi

# Ways between nodes besides those that small arrays take by themselves.
CROSSINGS = ["allreduce:1:4", "chunks:2:4"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
SIZES = [0, 1, 2, 3, 7, 64, 1009]


def rows_of(rank, numel, dtype, learners=1):
    generator = torch.Generator().manual_seed(100 * numel + rank)
    return torch.randn(learners, numel, generator=generator, dtype=torch.float64).to(dtype)


def everyone(topology, numel, dtype, learners=1):
    return torch.cat([rows_of(j, numel, dtype, learners) for j in range(topology.num_learners)]).double()


@pytest.fixture
def on_node(node):
    """Yield a topology of the ranks on this node."""
    made = Topology(node, min(2, node.Get_size()))
    yield made
    made.free()


@pytest.fixture(params=TRIED)
def nodes(world, request):
    """Yield topologies of groups of two ranks on all kinds of nodes; with nodes of 1, groups span them."""
    made = Nodes(world, min(2, world.Get_size()), request.param)
    yield made
    made.free()


def engines_on(nodes):
    """Return the engines that these nodes allow."""
    return [name for name in ENGINES if name != "shared" or nodes.num_nodes == 1]


@pytest.fixture(params=[*ENGINES, *CROSSINGS])
def engine(nodes, request):
    """Yield every engine on every layout that it takes, and every way between nodes."""
    if request.param in CROSSINGS:
        return TwoLevelEngine(nodes, crossing=Crossing.parse(request.param))
    if request.param not in engines_on(nodes):
        with pytest.raises(InputError, match=f"the ranks are on {nodes.num_nodes} nodes"):
            SharedEngine(nodes)
        return MpiEngine(nodes)
    return ENGINES[request.param](nodes)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
def test_means_of_any_size_and_dtype(nodes, engine, dtype):
    tolerance = 4 * torch.finfo(dtype).eps
    for numel in SIZES:
        if dtype.is_complex:
            own = torch.complex(*(rows_of(nodes.rank, numel, torch.float32) for _ in range(2)))
            expected = everyone(nodes, numel, torch.float32).mean(dim=0)
            expected = torch.complex(expected, expected)
        else:
            own = rows_of(nodes.rank, numel, dtype)
            expected = everyone(nodes, numel, dtype).mean(dim=0)
        out = torch.empty_like(own[0])
        own, values = engine.allocate(own), own
        own.copy_(values)
        before = own.clone()
        engine.mean(own, out, GLOBAL)
        assert torch.equal(own, before)
        assert torch.allclose(out.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
        engine.mean(own, own[0], GLOBAL)  # in place: the same bits
        assert torch.equal(own[0], out)


# Also around what all engines cut arrays into: slices by cache lines, small arrays, pieces, chunks on the wire.
edges = st.sampled_from([64, 32 * 1024, 128 * 1024, 256 * 1024]).flatmap(lambda edge: st.integers(edge - 9, edge + 9))


@settings(max_examples=8)
@given(numel=edges | st.integers(0, 20) | st.integers(0, 300_000), learners=st.integers(1, 2))
def test_all_engines_agree_to_two_ulp_at_any_size(world, numel, learners):
    """Of positive values: where a sum cancels, the last place of what is left says nothing.

    Two orders of n summands may differ by n roundings of half an ulp each: that is 2 for up to 4 learners.
    """
    values = 1.0 + rows_of(world.Get_rank(), numel, torch.float64, learners).abs()
    expected = world.allreduce(values.numpy().sum(axis=0)) / (world.Get_size() * learners)
    for layout in TRIED:
        nodes = Nodes(world, None, layout)
        for name in engines_on(nodes):
            engine = ENGINES[name](nodes)
            rows = engine.allocate(values.clone())
            rows.copy_(values)
            out = torch.empty_like(rows[0])
            engine.mean(rows, out, GLOBAL)
            error = np.abs(out.numpy() - expected) / expected / np.finfo(np.float64).eps
            assert error.max(initial=0.0) <= max(2, nodes.num_learners * learners / 2), (name, layout)
        nodes.free()


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_reach_every_element(topology, chunk, dtype):
    for numel in SIZES:
        whole, parts = (rows_of(topology.rank, numel, dtype)[0] for _ in range(2))
        MpiEngine(topology).mean(whole[None], whole, GLOBAL)
        MpiEngine(topology, max_chunk_elements=chunk).mean(parts[None], parts, GLOBAL)
        expected = everyone(topology, numel, dtype).mean(dim=0)
        tolerance = 4 * torch.finfo(dtype).eps
        assert torch.allclose(parts.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.allclose(parts.double(), whole.double(), rtol=tolerance, atol=tolerance)


def test_local_means_are_over_the_group_and_groups_do_not_meet(nodes, engine):
    rows = engine.allocate(torch.zeros(1, 300_007))
    members = nodes.local.allgather(nodes.rank)
    for repeat in range(5):
        rows.fill_(float(nodes.rank + repeat))
        engine.mean(rows, rows[0], LOCAL)
        assert (rows == sum(members) / len(members) + repeat).all()
        rows.fill_(float(nodes.rank + repeat))
        engine.mean(rows, rows[0], GLOBAL)
        assert (rows == (nodes.num_learners - 1) / 2 + repeat).all()


@pytest.mark.parametrize("crossing", ["allreduce:2", "allreduce:1", "chunks:1:60", "chunks:2:60"])
def test_a_group_may_have_fewer_lanes_than_all(world, crossing):
    """Of three ranks on two nodes of two only one has a partner, whatever the global mean found to be fastest."""
    nodes = Nodes(world, min(3, world.Get_size()), "nodes of 2")
    engine = TwoLevelEngine(nodes, crossing=Crossing.parse(crossing))
    rows = engine.allocate(torch.zeros(1, 300_007))
    members = nodes.local.allgather(nodes.rank)
    rows.fill_(float(nodes.rank))
    engine.mean(rows, rows[0], LOCAL)
    assert torch.allclose(rows, torch.full_like(rows, sum(members) / len(members)))
    nodes.free()


def test_every_rank_gets_the_same_bits_and_repeats_do_not_change_them(nodes, engine, world):
    rows = engine.allocate(torch.zeros(1, 1009))
    results = []
    for _ in range(3):
        rows.copy_(rows_of(nodes.rank, 1009, torch.float32))
        engine.mean(rows, rows[0], GLOBAL)
        results.append(rows.numpy().tobytes())
    assert len({*results, *world.allgather(results[0])}) == 1


def test_means_in_place_and_others_share_copies_in_turn(on_node, monkeypatch):
    """The first rank is slow to read the copies; the others overwrite those of the mean before, not those it reads."""
    engine, mean = SharedEngine(on_node), (on_node.num_learners - 1) / 2
    rows, out = engine.allocate(torch.zeros(1, 5000)), torch.empty(5000)
    if on_node.rank == 0:
        add_up = small.add_up
        monkeypatch.setattr(small, "add_up", lambda *parts: (time.sleep(0.05), add_up(*parts)))
    rows.fill_(float(on_node.rank))
    engine.mean(rows, rows[0], GLOBAL)
    first = rows.clone()
    rows.fill_(100.0 + on_node.rank)
    engine.mean(rows, out, GLOBAL)
    assert (first == mean).all()
    assert (out == 100 + mean).all()


def test_equal_values_have_themselves_as_mean_within_an_ulp(nodes, engine):
    values = rows_of(0, 1009, torch.float32)
    rows, before = engine.allocate(values.clone()), values.numpy()
    rows.copy_(values)
    engine.mean(rows, rows[0], GLOBAL)
    assert (np.abs(rows.numpy() - before) <= np.spacing(np.abs(before)) * nodes.num_learners).all()


def test_an_unknown_engine_is_refused(topology):
    with pytest.raises(InputError, match="engine='fast': must be one of auto, mpi, shared, twolevel"):
        select_engine("fast", topology)


def test_shared_memory_leaves_no_name_behind(on_node):
    SharedEngine(on_node).allocate(torch.zeros(1, 1000))
    assert shared_files(on_node.learner_ranks) == []


def test_shared_memory_is_refused_across_nodes(topology):
    topology.num_nodes = 2
    assert select_engine("auto", topology).name == ("twolevel" if topology.num_learners > 1 else "mpi")
    with pytest.raises(InputError, match="on 2 nodes"):
        select_engine("shared", topology)


def test_without_room_to_share_auto_warns_and_shared_is_refused(on_node, monkeypatch):
    monkeypatch.setattr(shared_memory.os, "posix_fallocate", no_room)
    array = torch.zeros(1, 5)
    with pytest.raises(InputError, match="more shared memory"):
        SharedEngine(on_node).allocate(array)
    engine = SharedEngine(on_node, is_required=False)
    if on_node.rank == 0:
        with pytest.warns(UserWarning, match="no room for"):
            home = engine.allocate(array)
    else:
        home = engine.allocate(array)
    assert home is array
    array.fill_(float(on_node.rank))
    engine.mean(array, array[0], GLOBAL)
    assert array.tolist() == [[(on_node.num_learners - 1) / 2] * 5]


def no_room(*arguments):
    raise OSError("No space left on device")


class Room:
    """The memory that the first node can share: as much as there is until it is full. Counts who asks then."""

    def __init__(self, monkeypatch, nodes):
        self.num_asked, self._monkeypatch, self._nodes = 0, monkeypatch, nodes

    def fill(self):
        if self._nodes.peers.bcast(self._nodes.rank) == 0:
            self._monkeypatch.setattr(shared_memory.os, "posix_fallocate", self._refuse)

    def _refuse(self, *arguments):
        self.num_asked += 1
        no_room()


def placed_on(nodes, engine, sizes):
    """Return arrays of these sizes where the engine wants them, and their values; the mean of all of them is exact."""
    arrays = [engine.allocate(torch.zeros(1, numel)) for numel in sizes]
    for array in arrays:
        array.fill_(float(nodes.rank))
    return arrays


def shares_memory(nodes):
    """Return the engine that shares memory here; it shares none of what comes when there is no room."""
    return (SharedEngine if nodes.num_nodes == 1 else TwoLevelEngine)(nodes, is_required=False)


@pytest.mark.parametrize("sizes", [(200_000, 100, 200_000), (100,)])
def test_where_copies_have_no_room_all_means_on_their_way_go_by_mpi(nodes, monkeypatch, sizes):
    engine, room, mean = shares_memory(nodes), Room(monkeypatch, nodes), (nodes.num_learners - 1) / 2
    arrays = placed_on(nodes, engine, sizes)
    room.fill()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pending = engine.start(arrays, GLOBAL)
            for array in arrays:
                array.fill_(-1.0)  # whatever becomes of the live values
            assert all((values == mean).all() for values in pending.wait())
            assert all((array == -1).all() for array in arrays)
            for array in arrays:
                array.fill_(float(nodes.rank))
    is_alone = nodes.num_learners == 1
    assert len([each for each in caught if "engine='mpi'" in str(each.message)]) == (nodes.rank == 0 and not is_alone)
    assert nodes.learner_ranks.allreduce(room.num_asked) == (not is_alone)
    engine.mean(arrays[0], arrays[0][0], GLOBAL)  # where they lie there is room
    assert (arrays[0] == mean).all()


@pytest.mark.parametrize("scope", [GLOBAL, LOCAL])
@pytest.mark.parametrize("numel", [100, 200_000])
def test_where_a_mean_beside_the_rows_has_no_room_it_goes_by_mpi(nodes, monkeypatch, numel, scope):
    engine, room = shares_memory(nodes), Room(monkeypatch, nodes)
    members = nodes.comm(scope).allgather(nodes.rank)
    (rows,) = placed_on(nodes, engine, (numel,))
    room.fill()
    out = torch.empty(numel)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in (1.0, 2.0, 3.0):
            rows.fill_(nodes.rank + value)
            engine.mean(rows, out, scope)
            assert (out == sum(members) / len(members) + value).all()
            assert (rows == nodes.rank + value).all()
            engine.mean(rows, rows[0], scope)
            assert (rows == sum(members) / len(members) + value).all()
    assert len(caught) <= 1
    assert room.num_asked <= 1  # once for all means


def test_an_engine_that_was_asked_for_by_name_is_refused_when_room_runs_out(nodes, monkeypatch):
    engine = (
        SharedEngine(nodes) if nodes.num_nodes == 1 else TwoLevelEngine(nodes, crossing=Crossing.parse("chunks:1:60"))
    )
    room = Room(monkeypatch, nodes)
    (rows,) = placed_on(nodes, engine, (200_000,))
    room.fill()
    if nodes.num_learners > 1:
        with pytest.raises(InputError, match="more shared memory"):
            engine.start([rows], GLOBAL)
        with pytest.raises(InputError, match="more shared memory"):
            engine.mean(rows, torch.empty(200_000), GLOBAL)


def test_what_is_pickled_of_a_row_is_the_row(on_node):
    rows = SharedEngine(on_node).allocate(torch.zeros(1, 100_000))
    assert rows.untyped_storage().nbytes() < 1.01 * rows.nbytes


def test_what_two_start_in_the_background_is_in_no_order(topology):
    """The first rank is in the one's barrier and all others are in the other's, who must go on waiting."""
    first, second = MpiEngine(topology), MpiEngine(topology)
    comms = [topology.background_comm(GLOBAL, each) for each in (first, second)]
    assert topology.background_comm(GLOBAL, first) is comms[0]
    if topology.rank:
        comms.reverse()
    requests = [comms[0].Ibarrier()]
    topology.learner_ranks.Barrier()
    is_early = requests[0].Test()
    topology.learner_ranks.Barrier()
    requests.append(comms[1].Ibarrier())
    MPI.Request.Waitall(requests)
    assert not is_early or topology.num_learners == 1


WIRE_DTYPES = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def compressed_means(nodes, wire_dtype, error_feedback, numel=200_003, rounds=6, change=0.01):
    """Return the relative errors of means of rows that change a little after each, and what this rank holds then."""
    engine = TwoLevelEngine(nodes, wire_format(wire_dtype, error_feedback))
    rows = engine.allocate(torch.zeros(1, numel))
    rows.copy_(rows_of(0, numel, torch.float32))
    exact = rows.double()
    errors = []
    for round in range(rounds):
        changed = change * rows_of(17 * round + nodes.rank, numel, torch.float64)
        rows.add_(changed.float())
        nodes.learner_ranks.Allreduce(MPI.IN_PLACE, changed.numpy())
        exact = exact + changed / nodes.num_learners
        engine.mean(rows, rows[0], GLOBAL)
        errors.append(float((rows.double() - exact).norm() / (change * nodes.num_learners**-0.5 * numel**0.5)))
    return errors, rows.numpy().tobytes()


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_compressed_means_round_changes_only_and_all_ranks_get_the_same_bits(nodes, world, wire_dtype):
    errors, bits = compressed_means(nodes, wire_dtype, error_feedback=False)
    assert len(set(world.allgather(bits))) == 1
    if nodes.num_nodes == 1:
        assert max(errors) < 1e-4
    else:
        # relative to the change of a mean, not to the parameters, which are a hundred times larger
        assert errors[0] < 1e-4
        assert 0.01 * WIRE_DTYPES[wire_dtype] < errors[1] < WIRE_DTYPES[wire_dtype] * world.Get_size() ** 0.5


@pytest.mark.parametrize("crossing", [None, Crossing(CHUNKS, 1, 60 * 1024)])
def test_small_arrays_are_not_compressed(nodes, crossing):
    engine = TwoLevelEngine(nodes, wire_format("bfloat16", False), crossing=crossing)
    rows = engine.allocate(torch.zeros(1, 5000))
    for round in range(2):
        rows.copy_(rows_of(17 * round + nodes.rank, 5000, torch.float32))
        exact = rows.double()
        nodes.learner_ranks.Allreduce(MPI.IN_PLACE, exact.numpy())
        engine.mean(rows, rows[0], GLOBAL)
        assert torch.allclose(rows.double(), exact / nodes.num_learners, rtol=0.0, atol=1e-6)


def test_error_feedback_keeps_errors_from_adding_up(nodes):
    without, _ = compressed_means(nodes, "bfloat16", error_feedback=False, rounds=40, numel=70_003)
    with_feedback, _ = compressed_means(nodes, "bfloat16", error_feedback=True, rounds=40, numel=70_003)
    if nodes.num_nodes == 1:
        assert without == with_feedback
    else:
        assert with_feedback[-1] < 0.5 * without[-1]
        assert with_feedback[-1] < 2 * with_feedback[4]


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_what_no_learner_changed_is_exact_on_the_wire(nodes, wire_dtype):
    engine = TwoLevelEngine(nodes, wire_format(wire_dtype, False))
    rows = engine.allocate(torch.zeros(1, 70_001))
    values = rows_of(0, 70_001, torch.float32)
    rows.copy_(values)
    engine.mean(rows, rows[0], GLOBAL)
    first = rows.clone()
    rows[:, ::2] += rows_of(nodes.rank, 35_001, torch.float32)
    engine.mean(rows, rows[0], GLOBAL)
    # On one node nothing is written for the wire, and a sum of eight equal values is rounded as any other.
    tolerance = 1e-6 if nodes.num_nodes == 1 else 0.0
    assert torch.allclose(rows[:, 1::2], first[:, 1::2], rtol=tolerance, atol=0.0)
    second = rows.clone()
    engine.mean(rows, rows[0], GLOBAL)
    assert torch.allclose(rows, second, rtol=tolerance, atol=0.0)


def test_compressed_means_go_on_where_a_checkpoint_changes_the_lanes(world):
    nodes = Nodes(world, None, "nodes of 2")
    engine = TwoLevelEngine(nodes, wire_format("bfloat16", False))
    rows = engine.allocate(torch.zeros(1, 300_000))
    name = size_class(rows.nbytes, rows.dtype)
    for number, lanes in enumerate((2, 1, 2)):
        engine.use_crossings({name: Crossing(CHUNKS, lanes, 60 * 1024)})
        rows.fill_(float(nodes.rank + number))
        engine.mean(rows, rows[0], GLOBAL)
        mean = (nodes.num_learners - 1) / 2 + number
        assert torch.allclose(rows, torch.full_like(rows, mean), rtol=2**-8)
    nodes.free()


@pytest.mark.parametrize(
    ("wire_dtype", "error_feedback", "message"),
    [("int8", False, "wire_dtype='int8': must be one of bfloat16, float16"), (None, True, "error_feedback=True")],
)
def test_wire_formats_that_do_not_exist_are_refused(wire_dtype, error_feedback, message):
    with pytest.raises(InputError, match=message):
        wire_format(wire_dtype, error_feedback)


# -- between nodes ------------------------------------------------------------------------------------------------


def test_the_fastest_crossing_is_chosen_by_all_ranks_told_and_kept(world, monkeypatch):
    nodes = Nodes(world, None, "nodes of 1")
    monkeypatch.setattr(
        twolevel, "trial", lambda tried, seconds: {way: 1.0 + (way.piece_bytes != 2**20) for way in tried}
    )
    engine = TwoLevelEngine(nodes)
    for numel in (300_000, 400_000, 50_000):  # two of one size class, and one that is not tried
        engine.allocate(torch.zeros(1, numel))
    if world.Get_size() == 1:
        assert engine.crossings == {}
        assert engine.notes == []
    else:
        assert {name: str(each) for name, each in engine.crossings.items()} == {
            "float32 up to 2 MiB": "allreduce:1:1024"
        }
        (note,) = engine.notes
        assert re.match(
            r"between nodes, float32 up to 2 MiB: allreduce:1:1024; "
            r"tried with [\d.]+ MB: allreduce:1:1024 1e\+03 ms, allreduce:1 2e\+03 ms, ",
            note,
        )
    nodes.free()


def test_a_trial_decides_for_all_ranks_alike(world):
    nodes = Nodes(world, None, "nodes of 2")
    engine = TwoLevelEngine(nodes)
    engine.allocate(torch.zeros(1, 2_000_000))
    assert len(set(world.allgather(str(engine.crossings)))) == 1
    assert len(engine.crossings) == (nodes.num_nodes > 1)
    nodes.free()


@pytest.mark.parametrize("way", ["chunks:1:64", "chunks:2:64", "chunks:2:1024", "allreduce:1", "allreduce:2:64"])
def test_sums_are_in_the_order_of_ranks_and_nodes(world, way):
    """MPI_Allreduce has an order of its own, which does not matter for two nodes; and it keeps this order."""
    nodes = Nodes(world, None, "nodes of 2")
    engine = TwoLevelEngine(nodes, crossing=Crossing.parse(way))
    rows = engine.allocate(torch.zeros(1, 150_001))
    repeats = []
    for _ in range(2):
        rows.copy_(rows_of(nodes.rank, 150_001, torch.float32))
        engine.mean(rows, rows[0], GLOBAL)
        repeats.append(rows.clone())
    assert torch.equal(*repeats)
    members = dict.fromkeys(map(tuple, world.allgather(nodes.node.allgather(nodes.rank))))
    expected = sum(sum(rows_of(j, 150_001, torch.float32) for j in node) for node in members) / world.Get_size()
    if way.startswith("chunks") or nodes.num_nodes <= 2:
        assert torch.equal(rows, expected)
    else:
        assert torch.allclose(rows, expected, rtol=0.0, atol=2e-7 * nodes.num_nodes)
    nodes.free()
