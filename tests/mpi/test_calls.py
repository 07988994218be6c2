"""Learners that meet are in the same call, or all of them learn who is in which."""

import math

import pytest
import torch
from torch import nn

from hpcavg import Averager, FlatBuffer, InputError, Topology, algorithms
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging.calls import Call, Kind, meet
from hpcavg.averaging.health import Excluded
from hpcavg.averaging.small_arrays import SmallArrays
from hpcavg.errors import MismatchError
from tests.mpi.nodes import Nodes

pytestmark = pytest.mark.mpi


def make(world, rule=None, model=None, **options):
    torch.manual_seed(3)
    model = model or nn.Linear(3, 2)
    topology = Topology(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Averager(model, optimizer, rule or algorithms.k_avg(2), topology, **options)


def take_steps(averager, count):
    for _ in range(count):
        averager.optimizer.zero_grad()
        averager.model(torch.ones(2, 3)).square().mean().backward()
        averager.step()


def test_what_learners_tell_each_other(world, topology):
    rank, size = world.Get_rank(), world.Get_size()
    call = Call(Kind.GLOBAL_AVERAGE, 0, 12, 3)
    found = meet(call, GLOBAL, topology, fingerprint=rank, rate=0.1 * (rank + 1), sick=[0] * (rank == 1))
    assert found.num_members == size
    assert list(found.fingerprints) == list(range(size))
    assert found.sick == ((1,) if size > 1 else ())
    assert not found.is_large
    assert found.rate == pytest.approx(0.1 * (size + 1) / 2)
    alike = meet(call, GLOBAL, topology, rate=0.1, is_large=True)
    assert (alike.rate, alike.is_large, alike.sick) == (0.1, True, ())


@pytest.mark.parametrize("asleep", [False, True])
def test_other_calls_are_an_error_on_all(world, topology, asleep):
    rank, size = world.Get_rank(), world.Get_size()
    last = size - 1
    own = Call(Kind.FINISH, 0, 11, 2) if rank == last else Call(Kind.GLOBAL_AVERAGE, 0, 12, 2)
    if size == 1:
        assert meet(own, GLOBAL, topology, asleep=asleep).num_members == 1
        return
    with pytest.raises(MismatchError) as raised:
        meet(own, GLOBAL, topology, asleep=asleep)
    others = "rank 0" if size == 2 else f"ranks 0-{last - 1}"
    assert f"{others} in global average of step 12; rank {last} in averager.finish() after step 11" in str(raised.value)
    assert raised.value.calls[last] == "averager.finish() after step 11"
    # Nothing is left half done: the next call is one like any other.
    assert meet(Call(Kind.FINISH, 0, 1, 1), GLOBAL, topology, asleep=asleep).num_members == size


def test_an_error_of_one_learner_is_raised_on_all(world, topology):
    error = InputError("model", "weight as (3,)", "(2,)") if world.Get_rank() == world.Get_size() - 1 else None
    with pytest.raises(InputError, match="weight as"):
        meet(Call(Kind.GLOBAL_AVERAGE, 0, 1, 0), GLOBAL, topology, error=error)


def test_calls_read_as_users_write_them():
    assert str(Call(Kind.LOCAL_AVERAGE, 0, 4, 1)) == "local average of step 4"
    assert str(Call(Kind.GLOBAL_AVERAGE, 1, None, 1)) == "global average of round 2 (averager 2)"
    assert str(Call(Kind.MEAN_MODEL, 0, 4, 1)) == "averager.mean_model() after step 4"
    assert str(Call(Kind.FINISH, 0, None, None)) == "averager.finish()"


@pytest.mark.parametrize("name", ["slowmo", "diloco", "k_avg", "dasgd"])
def test_learners_with_different_numbers_of_steps_do_not_finish(world, name):
    rank, size = world.Get_rank(), world.Get_size()
    options = {"tau": 4, "delay": 1} if name == "dasgd" else {"h" if name == "diloco" else "k": 4}
    averager = make(world, algorithms.build(name, options))
    take_steps(averager, 12 if rank == 0 else 13)
    if size == 1:
        averager.finish()
    else:
        with pytest.raises(
            MismatchError, match=r"rank 0 in averager.finish\(\) after step 12; ranks? 1.* after step 13"
        ):
            averager.finish()
    averager.topology.free()


def test_an_evaluation_of_one_learner_alone_meets_no_mean(world):
    averager = make(world)
    take_steps(averager, 1)

    def go_on():
        if world.Get_rank() == 0:
            with averager.mean_model():
                pass
        else:
            take_steps(averager, 1)

    if world.Get_size() > 1:
        with pytest.raises(MismatchError, match=r"rank 0 in averager.mean_model\(\) after step 1; .* of step 2"):
            go_on()
    averager.topology.free()


def test_calls_of_two_averagers_are_told_apart(world):
    rank, size = world.Get_rank(), world.Get_size()
    first = make(world)
    topology = first.topology
    model = nn.Linear(3, 2)
    second = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(2), topology)
    for averager in (first, second):
        take_steps(averager, 2)
    if size > 1:
        with pytest.raises(MismatchError, match=r"average of step 4; .*average of step 4 \(averager 2\)"):
            take_steps(first if rank == 0 else second, 2)
    topology.free()


def test_a_changed_model_of_one_learner_is_an_error_on_all(world):
    averager = make(world)
    take_steps(averager, 1)
    if world.Get_rank() == world.Get_size() - 1:
        averager.model.weight.data = torch.zeros(5)
    averager.optimizer.zero_grad()
    with pytest.raises(InputError, match="weight"):
        averager.step()
    averager.topology.free()


DIFFERENT = {
    "k": lambda odd: ({}, algorithms.k_avg(3 if odd else 2)),
    "algorithm": lambda odd: ({}, algorithms.slowmo(2) if odd else algorithms.k_avg(2)),
    "total_steps": lambda odd: ({"total_steps": 9 if odd else 8}, None),
    "buffers": lambda odd: ({"buffers": "keep" if odd else "average"}, None),
    "engine": lambda odd: ({"engine": "mpi" if odd else "auto"}, None),
    "check_rounds": lambda odd: ({"check_rounds": int(odd)}, None),
    "hang_timeout": lambda odd: ({"hang_timeout": 60.0 if odd else 600.0}, None),
}


@pytest.mark.parametrize("option", DIFFERENT)
def test_what_must_be_alike_is_compared(world, option):
    last = world.Get_size() - 1
    options, rule = DIFFERENT[option](world.Get_rank() == last > 0)
    if last:
        with pytest.raises(InputError, match=f"{option}.* on rank {last}.*as on rank 0"):
            make(world, rule, **options)
    else:
        make(world, rule, **options).topology.free()


def test_bad_options_of_one_rank_are_refused_on_all(world):
    is_odd = world.Get_rank() == world.Get_size() - 1
    with pytest.raises(InputError, match="non_finite"):
        make(world, non_finite="ignore" if is_odd else "exclude")
    with pytest.raises(InputError, match="hang_timeout"):
        make(world, hang_timeout=-1.0 if is_odd else None)
    with pytest.raises(InputError, match="start"):
        make(world, start="rank1")


def test_the_timeout_may_come_from_the_environment(world, monkeypatch):
    monkeypatch.setenv("HPCAVG_HANG_TIMEOUT", "soon")
    with pytest.raises(InputError, match="HPCAVG_HANG_TIMEOUT"):
        make(world)
    monkeypatch.setenv("HPCAVG_HANG_TIMEOUT", "0")
    make(world).topology.free()


# -- values whose sum overflows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["shared", "mpi"])
def test_the_mean_of_large_values_is_finite(world, dtype, engine):
    """Each learner holds 0.75 of the largest number; learner 0 its negative too."""
    large = 0.75 * torch.finfo(dtype).max
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(3, dtype=dtype))
    averager = make(world, algorithms.k_avg(1), model, engine=engine)
    rank, size = world.Get_rank(), world.Get_size()
    with torch.no_grad():
        model.x.copy_(torch.tensor([large, -large if rank == 0 else large, 1.0], dtype=dtype))
    model.x.grad = torch.zeros_like(model.x)
    averager.step()
    assert averager.totals.excluded == 0
    exact = float(torch.tensor(large, dtype=dtype))
    expected = [exact, exact * ((size - 2) / size), 1.0]
    tolerance = 2 * torch.finfo(dtype).eps
    assert model.x.tolist() == pytest.approx(expected, rel=tolerance)
    averager.finish()
    assert all(map(math.isfinite, model.x.tolist()))
    averager.topology.free()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's own word on the same
def test_a_delayed_mean_that_overflows_is_an_error_on_all(world):
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(3))
    averager = make(world, algorithms.dasgd(2, delay=1), model)
    with torch.no_grad():
        model.x.fill_(0.75 * torch.finfo(torch.float32).max)
    model.x.grad = torch.zeros(3)
    averager.step()
    averager.step()
    if world.Get_size() == 1:
        averager.step()
        assert model.x.isfinite().all()
    else:
        with pytest.raises(OverflowError, match="step 2"):
            averager.step()
    averager.topology.free()


def test_small_arrays_travel_with_a_meeting_and_every_learner_of_a_rank_counts(world):
    topology = Nodes(world, None, "nodes of 2", learners_per_rank=2)
    flat = FlatBuffer([("x", torch.zeros(2, 5)), ("y", torch.zeros(2, 3, dtype=torch.float64))], learners=2)
    for array in flat.arrays:
        array.copy_(torch.tensor([[topology.rank], [10.0 * topology.rank]]).expand_as(array))
    small = SmallArrays([flat], topology)
    meeting = meet(Call(Kind.MEAN_MODEL, 0, 1, 1), GLOBAL, topology, packed=small.pack(()))
    means = small.means(flat.arrays, GLOBAL, meeting, True, Excluded((), meeting.num_members, ()))
    assert len(means) == (2 if topology.num_nodes > 1 else 0)  # inside a node, the engine is faster
    assert all((mean == 5.5 * (topology.num_learner_ranks - 1) / 2).all() for mean in means.values())
    topology.free()
