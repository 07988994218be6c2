"""Learners in fewer ranks than learners: every one of them is what it is on a rank of its own."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms, stack
from hpcavg.distributed.waiting import wait_asleep

pytestmark = pytest.mark.mpi

STEPS = 16
SICK_STEP = 9
RULES = {
    "k_avg": algorithms.k_avg(4),
    "hier_avg": algorithms.hier_avg(k1=2, k2=6),
    "sync_sgd": algorithms.sync_sgd(),
    "sync_sgd of gradients": algorithms.sync_sgd(variant="gradients"),
    "pr_sgd": algorithms.pr_sgd(3),
    "dasgd": algorithms.dasgd(tau=4, delay=2, xi=0.25),
    "lupa": algorithms.lupa(5),
    "ada_lupa": algorithms.ada_lupa(2, growth="loss"),
    "slowmo": algorithms.slowmo(k=4, beta=0.6),
    "diloco": algorithms.diloco(h=5),
    "ring": algorithms.gossip("ring", k=2),
    "exponential": algorithms.gossip("exponential", k=1),
}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
}


class ByRow(torch.optim.Optimizer):
    """Normalises each gradient as a whole: not elementwise, so that several learners need one each."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / (1e-3 + p.grad.norm()), alpha=group["lr"])


def network():
    torch.manual_seed(3)
    # No bias before BatchNorm: its gradient is zero but for rounding, of which Adam makes steps.
    layers = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers).double()


def batch(learner, t):
    drawn = np.random.default_rng([learner, t])
    return torch.from_numpy(drawn.standard_normal((4, 1, 6, 6))), torch.from_numpy(drawn.integers(3, size=4))


def layout(world):
    """Return this rank's part of the world and the learners of each rank in it: as many as the world has ranks.

    The layouts train side by side. Of 8 ranks, the first 4 hold 2 learners each, the next 2 hold 4, and the next one 8.
    The part of a rank that is left over is null.
    """
    size, rank, end = world.Get_size(), world.Get_rank(), 0
    for ranks in (ranks for ranks in range(size - 1, 0, -1) if size % ranks == 0):
        end += ranks
        if rank < end:
            return world.Split(end, rank), size // ranks
    return world.Split(MPI.UNDEFINED), 0


def train(topology, rule, make_optimizer, sick=None, learners=None, **options):
    """Return all tensors of this rank's learners after every step, shape (steps, learners, n), and the events."""
    model = network() if learners is None else stack(network(), learners)
    optimizer = make_optimizer(model.parameters())
    averager = Averager(model, optimizer, rule, topology, total_steps=STEPS, batch_size=4, **options)
    found = []
    rows = 1 if learners is None else learners
    for _ in range(STEPS):
        optimizer.zero_grad()
        steps = [progress.step + 1 for progress in averager.progress_of]
        batches = [batch(learner, t) for learner, t in zip(topology.learners, steps, strict=True)]
        if learners is None:
            loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
        else:
            inputs, targets = map(torch.stack, zip(*batches, strict=True))
            loss = model.each(nn.functional.cross_entropy, model(inputs), targets)
        loss.sum().backward()
        if sick in topology.learners and averager.progress.step + 1 == SICK_STEP:
            weight = next(model.parameters()).grad.view(rows, -1)
            weight[topology.learners.index(sick), 3] = torch.nan
        averager.step(loss)
        found.append(tensors_of(model, rows))
    held = [torch.stack([batch(learner, t)[0] for learner in topology.learners]) for t in (1, 2)]
    averager.finish([each[0] for each in held] if learners is None else held)
    found.append(tensors_of(model, rows))
    # On a graph, a learner knows its neighbours only; a rank knows those of all its learners.
    is_graph = rule.name == "gossip"
    events = [(event.step, event.scope.name, is_graph or event.sick) for event in averager.events]
    topology.free()
    return torch.stack(found), events


def tensors_of(model, rows):
    with torch.no_grad():
        return torch.cat(
            [t.detach().double().reshape(rows, -1) for t in [*model.parameters(), *model.buffers()]], dim=1
        )


def check_all_layouts(world, rule, make_optimizer, sick=None, group_size=None, **options):
    common = (rule, make_optimizer, sick)
    own, events = train(Topology(world, group_size), *common, **options)
    everyone = torch.stack([torch.from_numpy(part) for part in world.allgather(own[:, 0].numpy())], dim=1)
    part, learners = layout(world)
    if part != MPI.COMM_NULL:
        topology = Topology(part, group_size, learners_per_rank=learners)
        found, others = train(topology, *common, learners=learners, **options)
        expected = everyone[:, part.Get_rank() * learners : (part.Get_rank() + 1) * learners]
        error = (found - expected).abs().amax(dim=2) / expected.abs().amax(dim=2)
        assert not error.isnan().logical_xor(expected.isnan().any(dim=2)).any()
        assert error.nan_to_num().max() <= 1e-10, (learners, error)
        if group_size is None:
            assert others == events
        part.Free()
    wait_asleep(world)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_layout(world, rule, optimizer):
    check_all_layouts(world, RULES[rule], OPTIMIZERS[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"sync_sgd of gradients"}))  # which makes all learners sick
def test_a_learner_that_falls_sick(world, rule, optimizer):
    if world.Get_size() > 1:
        check_all_layouts(world, RULES[rule], OPTIMIZERS[optimizer], sick=world.Get_size() - 1)


@pytest.mark.parametrize("sick", [None, 1])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_groups_inside_a_rank_and_across_ranks(world, group_size, sick):
    if world.Get_size() % group_size == 0 and group_size < world.Get_size():
        check_all_layouts(world, RULES["hier_avg"], OPTIMIZERS["momentum"], sick, group_size)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_state": "average"},
        {"optimizer_state": "reset"},
        {"buffers": "keep"},
        {"buffers": "recompute"},
        {"start": "own"},
        {"measure_distance": True},
        {"engine": "mpi"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sick", [None, 0])
def test_every_policy(world, options, optimizer, sick):
    if world.Get_size() > 1:
        check_all_layouts(world, RULES["k_avg"], OPTIMIZERS[optimizer], sick, **options)


def test_an_optimizer_that_is_not_elementwise(world):
    check_all_layouts(world, RULES["k_avg"], ByRow)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_learners_at_their_own_pace(world, optimizer):
    found = train_at_own_pace(world, 1, optimizer)
    everyone = torch.from_numpy(np.concatenate(world.allgather(found.numpy())))
    part, learners = layout(world)
    if part != MPI.COMM_NULL:
        found = train_at_own_pace(part, learners, optimizer)
        expected = everyone[part.Get_rank() * learners : (part.Get_rank() + 1) * learners]
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
        part.Free()
    wait_asleep(world)


def train_at_own_pace(comm, learners, optimizer):
    topology = Topology(comm, learners_per_rank=learners)
    model = stack(network(), learners)
    rule = algorithms.pr_sgd_hetero(local_steps=[2 + learner % 3 for learner in range(topology.num_learners)])
    averager = Averager(model, OPTIMIZERS[optimizer](model.parameters()), rule, topology, total_steps=STEPS)
    while not averager.done:
        averager.optimizer.zero_grad()
        steps = [progress.step + 1 for progress in averager.progress_of]
        batches = [batch(learner, t) for learner, t in zip(topology.learners, steps, strict=True)]
        inputs, targets = map(torch.stack, zip(*batches, strict=True))
        losses = model.each(nn.functional.cross_entropy, model(inputs), targets)
        losses.sum().backward()
        averager.step(losses)
    averager.finish()
    topology.free()
    return tensors_of(model, learners)


def test_equal_learners_in_one_rank_take_the_steps_of_one(world):
    """All learners hold the same model and see the same samples: the mean changes nothing."""
    if world.Get_size() > 1:
        return
    model, single = stack(network(), 4), network()
    topology = Topology(MPI.COMM_SELF, learners_per_rank=4)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(2), topology)
    optimizer = torch.optim.SGD(single.parameters(), lr=0.1)
    inputs, targets = batch(0, 0)
    for _ in range(6):
        for each in (optimizer, averager.optimizer):
            each.zero_grad()
        losses = model.each(nn.functional.cross_entropy, model(inputs.expand(4, -1, -1, -1, -1)), targets.expand(4, -1))
        losses.sum().backward()
        averager.step(losses)
        nn.functional.cross_entropy(single(inputs), targets).backward()
        optimizer.step()
    assert (tensors_of(model, 4) - tensors_of(single, 1)).abs().max() <= 1e-14
    assert averager.events[0].distances == pytest.approx([0.0] * 4, abs=1e-28)
    topology.free()


def test_what_does_not_fit_is_named(world):
    with pytest.raises(InputError, match="model='of 1 learner': must be of 3"):
        Averager(network(), None, algorithms.k_avg(2), Topology(world, learners_per_rank=3))
    model = stack(network(), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = Topology(world, learners_per_rank=2)
    averager = Averager(model, optimizer, RULES["ada_lupa"], topology)
    for loss in (torch.tensor(1.0), torch.ones(3), 1.0):
        with pytest.raises(InputError, match=r"loss=.*: must be a tensor of shape"):
            averager.step(loss)
    with pytest.raises(InputError, match="closure='given'"):
        averager.step(torch.ones(2), closure=lambda: 0.0)
    topology.free()
