"""Learners whose parameters are not finite are left out of means, restored by them, and reported."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.algorithms.scope import LOCAL
from hpcavg.averaging import health, small_arrays
from hpcavg.averaging.calls import Call, Kind, meet
from hpcavg.engines.select import ENGINES
from hpcavg.errors import SickLearnersError
from tests.mpi.nodes import TRIED, Nodes
from tests.mpi.problems import Logistic, Vector, values_of
from tests.oracles import sick, synchronous

pytestmark = pytest.mark.mpi

# Ways between nodes. Small arrays then do not travel with the reports of the learners.
CROSSINGS = ["chunks:2:4", "allreduce:1:4"]


def options_of(engine, monkeypatch):
    """Return the options for an engine or a way between nodes."""
    if engine not in CROSSINGS:
        return {"engine": engine}
    monkeypatch.setattr(small_arrays, "_GATHERED_BYTES", 0)
    return {"engine": "twolevel", "crossing": engine}


BAD = [math.nan, math.inf, -math.inf]


def make(world, rule, module, group_size=None, lr=1.0, momentum=0.0, **options):
    topology = Topology(world, group_size or min(2, world.Get_size()))
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
    return topology, Averager(module, optimizer, rule, topology, **options)


def move(averager, by):
    """Take a step by which a parameter vector changes by `by`."""
    averager.model.x.grad = torch.full_like(averager.model.x, -by)
    averager.step()


def infect(tensor, value=math.nan):
    with torch.no_grad():
        tensor.view(-1)[tensor.numel() // 2] = value


# -- which mean comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
def test_a_worked_example(world, value):
    """Learner j adds 2 j + 1 a step; without learner 1 of three, (1, -, 5) -> (2, -, 10) -> 6 on all of them."""
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, algorithms.k_avg(2), Vector(np.zeros(3)))
    x, ill = averager.model.x, size // 2
    healthy = [2 * j + 1 for j in range(size) if j != ill]
    move(averager, 2 * rank + 1)
    if rank == ill:
        infect(x, value)
    if size == 1:
        with pytest.raises(SickLearnersError, match=r"learner 0 \(1 of 1\) .* global average of step 2"):
            move(averager, 1)
    else:
        move(averager, 2 * rank + 1)
        expected = 2 * sum(healthy) / len(healthy)
        assert x.tolist() == pytest.approx([expected] * 3, rel=4e-16)
        assert [(event.sick, event.excluded) for event in averager.events] == [((ill,), 1)]
        assert averager.totals.excluded == 1
        move(averager, 2 * rank + 1)
        assert x.tolist() == pytest.approx([expected + 2 * rank + 1] * 3, rel=4e-16)
    topology.free()


@pytest.mark.parametrize("layout", TRIED)
@pytest.mark.parametrize("engine", [*ENGINES, *CROSSINGS])
def test_every_engine_takes_the_mean_of_the_others(world, engine, layout, monkeypatch):
    """At sizes that are averaged in one piece and in several, with one or all learners but one sick."""
    rank, size = world.Get_rank(), world.Get_size()
    cases = [
        (37, torch.float64, {0}),
        (38, torch.complex64, {size - 1}),
        (150_001, torch.float32, set(range(1, size))),
        (150_001, torch.bfloat16, {size - 1}),
    ]
    topology = Nodes(world, min(2, size), layout)
    if engine == "shared" and topology.num_nodes > 1:
        with pytest.raises(InputError):
            ENGINES[engine](topology)
        topology.free()
        return
    for numel, dtype, ill in cases:
        ill = ill if size > 1 else set()
        generator = torch.Generator().manual_seed(5)
        values = 1 + torch.rand(size, numel, generator=generator, dtype=torch.float64)
        values = (values * (1 + 1j) if dtype.is_complex else values).to(dtype)
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.zeros(numel, dtype=dtype)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        averager = Averager(model, optimizer, algorithms.k_avg(1), topology, **options_of(engine, monkeypatch))
        with torch.no_grad():
            model.x.copy_(values[rank])
        if rank in ill:
            infect(model.x, BAD[numel % 3])
        averager.step()
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = values[[j for j in range(size) if j not in ill]].to(wide).mean(dim=0)
        error = (model.x.detach().to(wide) - expected).abs().max() / expected.abs().min()
        assert error <= 2 * torch.finfo(dtype).eps
        everyone = world.allgather(model.x.detach().view(torch.uint8).numpy().tobytes())
        assert len(set(everyone)) == 1
    topology.free()


@pytest.mark.parametrize("layout", TRIED)
@pytest.mark.parametrize("engine", [*ENGINES, *CROSSINGS])
@pytest.mark.parametrize("rule", [algorithms.k_avg(1), algorithms.dasgd(2, 1, 0.0)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mean_of_the_others_is_rounded_once(world, engine, layout, rule, dtype, monkeypatch):
    """What all others hold alike is what comes out: a mean over all that is then enlarged would be rounded twice."""
    rank, size = world.Get_rank(), world.Get_size()
    topology = Nodes(world, min(2, size), layout)
    if engine == "shared" and topology.num_nodes > 1:
        topology.free()
        return
    compressed = {"wire_dtype": "bfloat16"} if engine in ("twolevel", "chunks:2:4") else {}
    for numel in (37, 150_001):
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.zeros(numel, dtype=dtype)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        averager = Averager(model, optimizer, rule, topology, **options_of(engine, monkeypatch), **compressed)
        for _ in range(rule.delay_steps):
            averager.step()
        for value, ill in [(3.0, None), (1.0, size - 1), (2.5, None), (1.75, 0)]:
            values = torch.linspace(1, value, numel).to(dtype)
            with torch.no_grad():
                model.x.copy_(values)
            if rank == ill and size > 1:
                infect(model.x)
            for _ in range(1 + rule.delay_steps):  # the mean is started, and merged
                averager.step()
            assert torch.equal(model.x, values) or (compressed and ill is None), (numel, value)
            assert averager.events[-1].sick == (() if ill is None or size == 1 else (ill,))
        averager.finish()
    topology.free()


RULES = [
    ("sync_sgd", {}),
    ("k_avg", {"k": 5}),
    ("hier_avg", {"k1": 2, "k2": 6}),
    ("pr_sgd", {"interval": 4}),
    ("pr_sgd_time_varying", {}),
    ("post_local_sgd", {"switch_step": 10, "k": 4}),
    ("lupa", {"tau": 6, "mu": 0.5}),
    ("ada_lupa", {"tau0": 3, "alpha": 0.4}),
    ("dasgd", {"tau": 4, "delay": 2, "xi": 0.25}),
    ("dasgd", {"tau": 5, "delay": 4, "xi": 0.0}),
    ("dasgd", {"tau": 5, "delay": 0, "xi": 0.6}),
    ("slowmo", {"k": 4, "beta": 0.6, "outer_lr": 0.9}),
    ("diloco", {"h": 5, "outer_lr": 0.7, "outer_momentum": 0.9}),
    ("one_shot", {}),
]


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_agrees_with_the_oracle_whenever_a_learner_falls_sick(world, name, options, monkeypatch):
    rank, size = world.Get_rank(), world.Get_size()
    num_steps, group_size = 25, min(2, size)
    problem = Logistic(size)
    generator = np.random.default_rng(17)
    for _ in range(2 if size > 1 else 0):
        ill, ill_step = int(generator.integers(size)), int(generator.integers(1, num_steps + 1))
        local = synchronous.LocalSgd(0.05, momentum=0.9)
        expected, final = sick.run(
            name, options, local, problem, num_steps, size, group_size, ill, ill_step, monkeypatch
        )
        rule = algorithms.build(name, options)
        module = problem.module()
        topology, averager = make(world, rule, module, group_size, lr=0.05, momentum=0.9, total_steps=num_steps)

        def fall_sick(*_, averager=averager, module=module, ill=ill, ill_step=ill_step):
            if (rank, averager.progress.step) == (ill, ill_step):
                infect(module.x)

        averager.optimizer.register_step_post_hook(fall_sick)
        for t in range(1, num_steps + 1):
            averager.optimizer.zero_grad()
            problem.loss(module, rank, t).backward()
            averager.step()
            if np.isfinite(expected[t - 1, rank]).all():
                assert np.allclose(values_of(module), expected[t - 1, rank], rtol=1e-12, atol=1e-13), (t, ill, ill_step)
        averager.finish()
        assert np.allclose(values_of(module), final, rtol=1e-12, atol=1e-13)
        assert {learner for event in averager.events for learner in event.sick} <= {ill}
        assert averager.totals.excluded == sum(event.excluded for event in averager.events)
        topology.free()


@pytest.mark.parametrize(("name", "options"), RULES, ids=str)
def test_healthy_learners_see_no_difference(world, name, options, monkeypatch):
    """Bit for bit what comes out where nobody looks."""
    ends = []
    for _ in range(2):
        problem = Logistic(world.Get_size())
        module = problem.module()
        rule = algorithms.build(name, options)
        topology, averager = make(world, rule, module, lr=0.05, momentum=0.9, total_steps=25, check_rounds=len(ends))
        for t in range(1, 26):
            averager.optimizer.zero_grad()
            problem.loss(module, world.Get_rank(), t).backward()
            averager.step()
        averager.finish()
        ends.append(values_of(module))
        assert averager.totals.excluded == 0
        monkeypatch.setattr(health, "examine", lambda arrays, num_learners: (True, False))
        topology.free()
    assert np.array_equal(*ends)


def test_a_compressed_mean_without_a_learner_is_exact_and_the_next_goes_on(world):
    rank, size = world.Get_rank(), world.Get_size()
    topology = Nodes(world, min(2, size), "nodes of 1")
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.zeros(100_000)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"engine": "twolevel", "wire_dtype": "bfloat16", "error_feedback": True}
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology, **options)
    for step in range(1, 6):
        before = model.x.detach().double()  # the same on all learners, the sick one included
        model.x.grad = torch.full_like(model.x, -(1 + rank / 1024))
        ill = {size - 1} if step == 3 and size > 1 else set()
        if rank in ill:
            infect(model.x)
        averager.step()
        healthy = [j for j in range(size) if j not in ill]
        expected = before + 1 + sum(healthy) / len(healthy) / 1024
        # Where it is rounded: differences of up to 2, twice, with what was carried over.
        tolerance = 2 * torch.finfo(torch.float32).eps * expected.max() if ill else 2.0**-6
        assert (model.x.detach() - expected).abs().max() <= tolerance, step
        everyone = world.allgather(model.x.detach().numpy().tobytes())
        assert len(set(everyone)) == 1
    topology.free()


@settings(max_examples=10)
@given(data=st.data())
def test_any_learners_may_be_sick(world, data):
    rank, size = world.Get_rank(), world.Get_size()
    ill = data.draw(st.sets(st.integers(0, size - 1)))
    topology, averager = make(world, algorithms.k_avg(1), Vector(np.zeros(5)), non_finite="exclude")
    if rank in ill:
        infect(averager.model.x)
    if len(ill) == size:
        with pytest.raises(SickLearnersError) as raised:
            move(averager, 1)
        assert raised.value.learners == list(range(size))
    else:
        move(averager, rank)
        healthy = [j for j in range(size) if j not in ill]
        assert averager.model.x.tolist() == pytest.approx([sum(healthy) / len(healthy)] * 5, rel=4e-16)
        assert averager.events[-1].sick == tuple(sorted(ill))
    topology.free()


# -- what becomes of the sick -------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", ["average", "keep"])
@pytest.mark.parametrize("policy", ["keep", "average", "reset"])
def test_momentum_and_buffers_start_over(world, policy, buffers):
    """NaN in an input makes all of a learner NaN: parameters, momentum and BatchNorm statistics."""
    rank, size = world.Get_rank(), world.Get_size()
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    rule, options = algorithms.k_avg(2), {"optimizer_state": policy, "buffers": buffers}
    topology, averager = make(world, rule, model, lr=0.1, momentum=0.9, **options)
    ill, state = size - 1, averager.optimizer.state
    torch.manual_seed(rank)
    for step in range(1, 7):
        inputs = torch.randn(8, 4)
        if rank == ill and step == 1 and size > 1:
            infect(inputs)
        averager.optimizer.zero_grad()
        model(inputs).square().mean().backward()
        averager.step()
        if step == 1 and rank == ill and size > 1:
            assert not math.isfinite(model[1].running_mean.sum())
            assert not math.isfinite(state[model[0].weight]["momentum_buffer"].sum())
        if step == 2:
            assert averager.events[-1].sick == ((ill,) if size > 1 else ())
            assert (len(state) == 0) == (policy == "reset" or (size > 1 and rank == ill))
            everyone = world.allgather(model[1].running_mean.tolist())
            others = np.mean([values for j, values in enumerate(everyone) if j != ill or size == 1], axis=0)
            assert everyone[ill] == pytest.approx(others, rel=1e-6)
    averager.finish()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert averager.totals.excluded == (1 if size > 1 else 0)
    topology.free()


def test_a_group_of_nothing_but_sick_learners_waits_for_the_others(world):
    """Groups of two, of one where there are two ranks; the first group is sick at the first of two local means."""
    rank, size = world.Get_rank(), world.Get_size()
    group_size = 2 if size > 2 else 1
    topology, averager = make(world, algorithms.hier_avg(1, 3), Vector(np.zeros(3)), group_size)
    ill = set(range(group_size)) if size > 1 else set()
    if rank in ill:
        infect(averager.model.x)
    for step in (1, 2, 3):
        move(averager, rank)
        assert np.isfinite(values_of(averager.model)).all() == (rank not in ill or step == 3)
    healthy = [3 * j for j in range(size) if j not in ill]
    assert averager.model.x.tolist() == pytest.approx([sum(healthy) / len(healthy)] * 3, rel=1e-15)
    own = tuple(sorted(ill)) if rank in ill else ()
    assert [event.sick for event in averager.events] == [own, own, tuple(sorted(ill))]
    topology.free()


def test_a_delayed_mean_restores_where_it_is_merged(world):
    """Learner j adds 2 j + 1 a step; the mean of the others at t = 2 takes the sick one's place at t = 3."""
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, algorithms.dasgd(2, 1, 0.25), Vector(np.zeros(3)), momentum=0.5)
    ill, own = size - 1, 2 * rank + 1
    healthy = [2 * j + 1 for j in range(size) if j != ill or size == 1]
    mean = (1 + 1.5) * sum(healthy) / len(healthy)
    move(averager, own)
    if rank == ill and size > 1:
        infect(averager.model.x)
    move(averager, own)
    with averager.mean_model() as model:  # the learner is still sick, whatever the mean's start has made of it
        assert model.x.tolist() == pytest.approx([mean] * 3, rel=1e-15)
    saved = averager.model.state_dict(), averager.optimizer.state_dict(), averager.state_dict()
    topology.free()
    topology, averager = make(world, algorithms.dasgd(2, 1, 0.25), Vector(np.zeros(3)), momentum=0.5)
    for part, state in zip((averager.model, averager.optimizer, averager), saved, strict=True):
        part.load_state_dict(state)
    move(averager, own)
    is_ill = rank == ill and size > 1
    expected = mean if is_ill else 0.25 * (1 + 1.5 + 1.75) * own + 0.75 * mean
    assert averager.model.x.tolist() == pytest.approx([expected] * 3, rel=1e-15)
    assert (len(averager.optimizer.state) == 0) == is_ill
    assert math.isnan(averager.events[-1].consensus_distance) == is_ill
    assert averager.events[-1].sick == ((ill,) if size > 1 else ())
    averager.finish()
    assert averager.totals.excluded == (1 if size > 1 else 0)
    topology.free()


def test_the_agreed_loss_is_that_of_the_others(world):
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, algorithms.ada_lupa(2, growth="loss"), Vector(np.zeros(1)))
    for t in range(1, 11):
        averager.model.x.grad = torch.zeros(1, dtype=torch.float64)
        loss = 8.0 if t <= 4 else 1.0
        averager.step(math.nan if rank == 0 and t == 3 and size > 1 else loss)
    assert [event.period_steps for event in averager.events] == [2, 2, 2, 4]
    averager.finish(torch.zeros(1))
    topology.free()


# -- evaluations, ends and errors ---------------------------------------------------------------------------------


def test_an_evaluation_leaves_the_sick_out_and_as_they_are(world):
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, algorithms.one_shot(), Vector(np.full(4, 1.0 + rank)), non_finite="stop")
    with torch.no_grad():
        averager.model.x.fill_(1.0 + rank)
    if rank == 0:
        averager.model.x.data.view(torch.int64)[1] = 0x7FF8_0000_0000_1234  # a NaN like no other
    before = averager.model.x.detach().view(torch.int64).clone()
    with averager.mean_model() as model:
        found = model.x.tolist()
    assert torch.equal(averager.model.x.detach().view(torch.int64), before)
    if size > 1:
        assert found == pytest.approx([sum(range(2, size + 1)) / (size - 1)] * 4, rel=1e-15)
    else:
        assert math.isnan(found[1])  # an evaluation has nothing to stop
    assert len(averager.events) == 0
    topology.free()


def test_the_final_mean_leaves_the_sick_out(world):
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, algorithms.one_shot(), Vector(np.zeros(2)))
    move(averager, 1 + rank)
    if rank == size - 1 and size > 1:
        infect(averager.model.x)
    averager.finish()
    healthy = [1 + j for j in range(size) if j < size - 1 or size == 1]
    assert averager.model.x.tolist() == pytest.approx([sum(healthy) / len(healthy)] * 2, rel=4e-16)
    assert averager.totals.excluded == (1 if size > 1 else 0)
    topology.free()


@pytest.mark.parametrize("rule", [algorithms.k_avg(2), algorithms.dasgd(2, 1)])
def test_stop_says_on_all_learners_which_and_when(world, rule):
    """A delayed mean brings the news along and stops the run where it is merged."""
    rank, size = world.Get_rank(), world.Get_size()
    topology, averager = make(world, rule, Vector(np.zeros(2)), non_finite="stop")
    move(averager, 1)
    if rank == size - 1:
        infect(averager.model.x, math.inf)
    for _ in range(rule.delay_steps):
        move(averager, 1)
    with pytest.raises(SickLearnersError, match=rf"learner {size - 1} \(1 of {size}\).*global average of step 2"):
        move(averager, 1)
    topology.free()


@pytest.mark.parametrize("rule", [algorithms.downpour(2, 2), algorithms.downpour(3, 2), algorithms.eamsgd(2)], ids=str)
def test_a_sick_learner_takes_the_centre_and_leaves_it_alone(world, rule):
    rank, size = world.Get_rank(), world.Get_size()
    if size == 1:
        return  # no rank to serve
    topology = Topology(world, num_servers=1)
    model = Vector(np.zeros(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averager = Averager(model, optimizer, rule, topology, total_steps=12)
    while not averager.done:
        optimizer.zero_grad()
        (model.x - 1).square().sum().backward()
        averager.step()
        step = averager.progress.step
        if rank == 0 and step == 5:
            infect(model.x)
        if not (rank == 0 and step == 5):
            assert np.isfinite(values_of(model)).all(), step
    averager.finish()
    assert np.isfinite(values_of(model)).all()
    if not topology.is_server:
        assert [event.step for event in averager.events if event.sick] == ([6] if rank == 0 else [])
        assert averager.totals.excluded == (rank == 0)
    topology.free()


def test_members_of_a_group_are_named_by_their_index_among_all(world):
    topology = Topology(world, min(2, world.Get_size()))
    found = meet(Call(Kind.LOCAL_AVERAGE, 0, 1, 0), LOCAL, topology, sick=[0])
    first = topology.rank - topology.rank % 2
    assert found.sick == tuple(range(first, min(first + 2, world.Get_size())))
    assert len(found.sick) == found.num_members
    topology.free()


@pytest.mark.parametrize(
    ("numel", "dtype"),
    [(5, torch.float64), (60_000, torch.bfloat16), (300_007, torch.float32), (300_007, torch.complex64)],
    ids=str,
)
@pytest.mark.parametrize(
    "rule", [algorithms.k_avg(1), algorithms.slowmo(1), algorithms.dasgd(1, 0)], ids=lambda rule: rule.name
)
def test_the_distance_from_the_mean(world, topology, rule, numel, dtype):
    """All learners hold normal numbers. Of a large array the distance is measured on 4096 elements."""
    rank, size = world.Get_rank(), world.Get_size()
    values = [
        torch.randn(numel, generator=torch.Generator().manual_seed(j), dtype=torch.float64).to(dtype)
        for j in range(size)
    ]
    wide = [value.to(torch.complex128 if dtype.is_complex else torch.float64) for value in values]
    expected = float((wide[rank] - sum(wide) / size).abs().square().sum())
    for measure_distance, tolerance in ((True, 0.0), (False, 0.1 if numel > 65536 else 0.0)):
        model = nn.Module()
        model.x = nn.Parameter(torch.zeros(numel, dtype=dtype))
        model.x.grad = -values[rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # its step leads to the values
        averager = Averager(model, optimizer, rule, topology, measure_distance=measure_distance)
        averager.step()
        (event,) = averager.events
        rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert event.consensus_distance == pytest.approx(expected, rel=tolerance + rounding, abs=1e-9)
