"""AMP's GradScaler: a skipped update still counts as a step and averages when it is due, on every rank alike."""

import pytest
import torch
from torch import nn

from hpcavg import Averager, Topology, algorithms
from hpcavg.config.options import Config
from hpcavg.tasks import Task
from hpcavg.training.forward_backward import ForwardBackward

pytestmark = pytest.mark.mpi

RULES = [
    algorithms.k_avg(3),
    algorithms.hier_avg(1, 3),
    algorithms.sync_sgd("gradients"),
    algorithms.pr_sgd(3),
    algorithms.lupa(3),
    algorithms.ada_lupa(3, growth="loss"),
    algorithms.dasgd(3, 0, 0.25),
    algorithms.dasgd(3, 1, 0.0),
    algorithms.slowmo(3),
    algorithms.diloco(3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_one_rank_overflows_where_a_mean_is_due(world, rule):
    """Rank 1's gradient is infinite at step 3; nothing hangs, and the learners go on as one."""
    rank = world.Get_rank()
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = Topology(world)
    averager = Averager(model, optimizer, rule, topology)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    overflowing = min(1, world.Get_size() - 1)
    for step in range(1, 7):
        scale = float("inf") if rank == overflowing and step == 3 else 1.0
        optimizer.zero_grad()
        loss = model(torch.full((4, 3), 0.1 * (rank + step))).pow(2).mean()
        scaler.scale(loss * scale).backward()
        before = model.weight.detach().clone()
        averager.step(loss.detach(), scaler=scaler)
        if scale != 1.0 and world.Get_size() == 1 and rule.name == "k_avg":
            assert torch.equal(model.weight, before)
        scaler.update()
    assert averager.progress.step == 6
    averager.finish()
    values = [parameter.tolist() for parameter in model.parameters()]
    assert world.bcast(values) == values
    assert torch.isfinite(model.weight).all()
    if rule.name != "sync_sgd":
        assert averager.totals.global_averages >= 2
        assert scaler.get_scale() == (4.0 if rank == overflowing else 8.0)
    topology.free()


@pytest.mark.parametrize("due", [1, 2])
def test_all_ranks_are_equal_right_after_the_mean_at_the_overflow(world, due):
    rank = world.Get_rank()
    torch.manual_seed(rank)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(due), topology)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(1, due + 1):
        optimizer.zero_grad()
        value = float("inf") if rank == 1 and step == due else 1.0 + rank
        scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
        averager.step(scaler=scaler)
        scaler.update()
    values = model.weight.tolist()
    assert world.bcast(values) == values
    assert torch.isfinite(model.weight).all()
    topology.free()


def test_averaged_gradients_are_clipped_as_one(world):
    """The mean of (6, 8) times 1, ..., P over P learners has norm 5 (P + 1); clipped to 1 it is (0.6, 0.8) for all."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    task = Task("line", lambda: model, lambda: None, lambda output, target: (output * target).sum())
    passes = ForwardBackward(Config(clip_norm=1.0), task, model, optimizer)
    averager = Averager(model, optimizer, algorithms.sync_sgd("gradients"), topology)
    passes.gradients(torch.tensor([[6.0, 8.0]]), torch.tensor([[world.Get_rank() + 1.0]]))
    averager.step()
    assert torch.allclose(model.weight, torch.tensor([[-0.6, -0.8]]), atol=1e-5)
    topology.free()
