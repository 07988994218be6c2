"""The averager on real ranks: hand-worked steps, policies, awkward models."""

import numpy as np
import pytest
import torch
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms
from tests.mpi.nodes import Nodes
from tests.mpi.problems import Vector

pytestmark = pytest.mark.mpi


def test_a_worked_example(world):
    """Learner j adds 2 j + 1 a step, so P learners have the mean P a step: with two, (1, 3) -> (2, 6) -> 4 -> ..."""
    rank, size = world.Get_rank(), world.Get_size()
    model = Vector(np.zeros(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(2), topology)
    own = 2 * rank + 1
    found = []
    for _ in range(4):
        model.x.grad = torch.full((3,), -float(own), dtype=torch.float64)
        averager.step()
        found.append(model.x.tolist())
    assert found == [[own] * 3, [2 * size] * 3, [2 * size + own] * 3, [4 * size] * 3]
    assert averager.totals.global_averages == 2
    assert [event.step for event in averager.events] == [2, 4]
    topology.free()


def test_pr_sgd_averages_before_the_step(world):
    """Learner j adds 2 j + 1 a step; with two and I = 2: (1, 3), mean 2 -> (3, 5), (4, 8), mean 6 -> (7, 9)."""
    rank, size = world.Get_rank(), world.Get_size()
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.pr_sgd(2), topology)
    own = 2 * rank + 1
    found = []
    for _ in range(4):
        model.x.grad = torch.tensor([-float(own)], dtype=torch.float64)
        averager.step()
        found.append(model.x.item())
    assert found == [own, size + own, size + 2 * own, 3 * size + own]
    averager.finish()
    assert model.x.item() == 4 * size
    topology.free()


def test_hierarchical_worked_example(world):
    """K1 = 1, K2 = 3, groups of 2: learner j adds j a step, so the group of 2g and 2g + 1 has mean 2g + 1/2 a step."""
    rank, size = world.Get_rank(), world.Get_size()
    topology = Topology(world, min(2, size))
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, algorithms.hier_avg(1, 3), topology)
    peers = [j for j in range(size) if j // 2 == rank // 2] if size > 1 else [0]
    group = sum(peers) / len(peers)
    found = []
    for _ in range(4):
        model.x.grad = torch.tensor([-float(rank)], dtype=torch.float64)
        averager.step()
        found.append(model.x.item())
    overall = (size - 1) / 2
    assert found == pytest.approx([group, 2 * group, 3 * overall, 3 * overall + group], abs=1e-12)
    assert (averager.totals.local_averages, averager.totals.global_averages) == (3, 1)
    topology.free()


def test_all_learners_start_at_rank_0s_parameters_and_end_equal(world):
    torch.manual_seed(world.Get_rank())
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, dtype=torch.float32))
    topology = Topology(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, algorithms.one_shot(), topology)
    torch.manual_seed(0)
    expected = nn.Linear(5, 3).weight
    assert torch.equal(model[0].weight, expected)
    torch.manual_seed(100 + world.Get_rank())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).sum().backward()
        averager.step()
    own = model[0].weight.detach().clone()
    everyone = [torch.tensor(values) for values in world.allgather(own.tolist())]
    averager.finish()
    assert torch.allclose(model[0].weight, torch.stack(everyone).mean(dim=0), atol=1e-6)
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    assert world.bcast(state) == state
    topology.free()


def test_frozen_layers_and_counters_start_equal_and_are_left_alone(world):
    torch.manual_seed(world.Get_rank())
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    model[1].num_batches_tracked.fill_(7 + world.Get_rank())
    optimizer = torch.optim.SGD(model[1:].parameters(), lr=0.1)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(2), topology)
    assert model[1].num_batches_tracked.item() == 7
    frozen = model[0].weight.tolist()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        averager.step()
    averager.finish()
    assert model[0].weight.tolist() == frozen == world.bcast(frozen)
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    assert world.bcast(state) == state
    topology.free()


def test_unfreezing_later_is_an_error_that_names_the_parameter(world):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology)
    model[0].requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(InputError, match=r"0\.weight"):
        averager.step()
    topology.free()


@pytest.mark.parametrize("rule", [algorithms.sync_sgd("gradients"), algorithms.pr_sgd(1)], ids=["gradients", "pr_sgd"])
def test_a_closure_is_refused_where_the_mean_comes_first(world, rule):
    model = Vector(np.zeros(1))
    topology = Topology(world)
    averager = Averager(model, torch.optim.LBFGS(model.parameters()), rule, topology)
    with pytest.raises(InputError, match="closure"):
        averager.step(closure=lambda: 0.0)
    topology.free()


class Awkward(nn.Module):
    """Frozen in the middle, tied, transposed, zero-sized, half precision, and a part that only some ranks use."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.transposed = nn.Parameter(torch.randn(5, 3).t())
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.sixteen_bits = nn.Parameter(torch.randn(7).to(torch.bfloat16))
        self.sixty_four_bits = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.seldom = nn.Linear(3, 3)

    def forward(self, x, use_seldom):
        y = self.tied(self.frozen(self.first(x))) @ self.transposed.new_ones(3, 3)
        y = (
            y.sum()
            + (self.transposed**2).sum()
            + self.sixteen_bits.float().pow(2).sum()
            + self.sixty_four_bits.pow(2).sum().float()
        )
        return y + self.seldom(x).sum() if use_seldom else y


@pytest.mark.parametrize("rule", [algorithms.k_avg(2), algorithms.sync_sgd("gradients")], ids=["k_avg", "gradients"])
def test_awkward_models_are_averaged_whole(world, rule):
    rank = world.Get_rank()
    torch.manual_seed(3)
    model = Awkward()
    frozen = model.frozen.weight.clone()
    groups = [{"params": [model.first.weight, model.transposed]}, {"params": [model.first.bias], "lr": 0.01}]
    rest = [model.sixteen_bits, model.sixty_four_bits, model.empty, *model.seldom.parameters()]
    optimizer = torch.optim.SGD([*groups, {"params": rest}], lr=0.02)
    topology = Topology(world)
    averager = Averager(model, optimizer, rule, topology)
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3), use_seldom=rank == 0).backward()
        averager.step()
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().tolist()
        assert world.bcast(values) == values, name
    assert model.tied.weight is model.first.weight
    assert torch.equal(model.frozen.weight, frozen)
    topology.free()


def test_a_parameter_whose_gradient_is_none_on_one_rank_is_averaged(world):
    rank, size = world.Get_rank(), world.Get_size()
    model = Vector(np.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology)
    model.x.grad = torch.full((2,), -float(size), dtype=torch.float64) if rank == 0 else None
    averager.step()
    assert model.x.tolist() == [1.0, 1.0]
    topology.free()


def test_two_parameters_over_the_same_memory_have_gradients_of_their_own(world):
    memory = torch.zeros(2, dtype=torch.float64)
    one, two = nn.Parameter(memory), nn.Parameter(memory)
    topology = Topology(world)
    averager = Averager(nn.Module(), torch.optim.SGD([one, two], lr=1.0), algorithms.sync_sgd("gradients"), topology)
    one.grad, two.grad = (torch.full((2,), value * (world.Get_rank() + 1), dtype=torch.float64) for value in (1.0, 2.0))
    averager.step()
    expected = -3.0 * (world.Get_size() + 1) / 2
    assert one.tolist() == two.tolist() == pytest.approx([expected] * 2)
    topology.free()


def test_a_gradient_that_is_none_everywhere_stays_none(world):
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.sync_sgd("gradients"), topology)
    before = model["unused"].weight.clone()
    model["used"](torch.ones(1, 2)).sum().backward()
    averager.step()
    assert model["unused"].weight.grad is None
    assert torch.equal(model["unused"].weight, before)
    topology.free()


def batch_norm_learners(world, **policies):
    """Train a BatchNorm model for two steps on inputs that differ by learner, with a global mean at the second."""
    rank = world.Get_rank()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    topology = Topology(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    averager = Averager(model, optimizer, algorithms.k_avg(2), topology, **policies)
    torch.manual_seed(10 + rank)
    own = []
    for step in (1, 2):
        optimizer.zero_grad()
        model(torch.randn(8, 4) + rank).pow(2).mean().backward()
        if step == 2:
            own = [model[1].running_mean.clone()]
        averager.step()
    return model, optimizer, averager, own[0]


def test_buffers_are_averaged_by_default_and_kept_on_request(world):
    model, _, averager, own = batch_norm_learners(world)
    everyone = torch.tensor(world.allgather(own.tolist()))
    assert torch.allclose(model[1].running_mean, everyone.mean(dim=0), atol=1e-6)
    assert model[1].num_batches_tracked.item() == 2
    averager.topology.free()
    model, _, averager, own = batch_norm_learners(world, buffers="keep")
    assert torch.equal(model[1].running_mean, own)
    averager.topology.free()


def test_recomputed_buffers_are_equal_on_all_learners(world):
    model, _, averager, _ = batch_norm_learners(world, buffers="recompute")
    batches = [torch.randn(8, 4) for _ in range(3)]
    averager.finish(batches)
    values = model[1].running_var.tolist()
    assert world.bcast(values) == values
    averager.topology.free()


@pytest.mark.parametrize("policy", ["keep", "average"])
def test_momentum_is_kept_or_averaged(world, policy):
    model, optimizer, averager, _ = batch_norm_learners(world, optimizer_state=policy)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].flatten().tolist()
    equal = all(world.allgather(world.bcast(momentum) == momentum))
    assert equal == (policy == "average" or world.Get_size() == 1)
    averager.topology.free()


def test_averaged_state_is_the_mean_also_when_some_learners_have_none(world):
    rank, size = world.Get_rank(), world.Get_size()
    everywhere, somewhere = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([everywhere, somewhere], lr=0.1)
    topology = Topology(world)
    averager = Averager(nn.Module(), optimizer, algorithms.k_avg(1), topology, optimizer_state="average")
    everywhere.grad = torch.full((3,), float(rank))
    somewhere.grad = torch.ones(3) if rank == 0 else None
    averager.step()
    mean = 0.1 * (size - 1) / 2
    assert optimizer.state[everywhere]["exp_avg"].tolist() == pytest.approx([mean] * 3, abs=1e-7)
    assert (somewhere in optimizer.state) == (rank == 0)
    if size == 1 or rank == 0:
        assert optimizer.state[somewhere]["exp_avg"].tolist() == pytest.approx([0.1] * 3)
    topology.free()


def test_different_models_are_refused_on_every_rank(world):
    rank, size = world.Get_rank(), world.Get_size()
    model = nn.Linear(3, 3 if rank < size - 1 or size == 1 else 4)
    topology = Topology(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if size == 1:
        Averager(model, optimizer, algorithms.sgd(), topology)
    else:
        with pytest.raises(InputError, match=f"weight.*on rank {size - 1}"):
            Averager(model, optimizer, algorithms.sgd(), topology)
    topology.free()


def test_an_unusable_model_on_one_rank_is_refused_on_every_rank(world):
    rank = world.Get_rank()
    model = nn.LazyLinear(3) if rank == 0 else nn.Linear(3, 3)
    topology = Topology(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="lazy"):
        Averager(model, optimizer, algorithms.sgd(), topology)
    topology.free()


def test_the_mean_model_is_the_mean_and_then_gone(world):
    rank, size = world.Get_rank(), world.Get_size()
    model = Vector(np.zeros(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.one_shot(), topology)
    model.x.grad = torch.full((4,), -float(rank), dtype=torch.float64)
    averager.step()
    with averager.mean_model() as mean:
        assert mean.x.tolist() == pytest.approx([(size - 1) / 2] * 4)
    assert model.x.tolist() == [rank] * 4
    averager.finish()
    assert model.x.tolist() == pytest.approx([(size - 1) / 2] * 4)
    assert averager.totals.global_averages == 1
    topology.free()


def test_finish_takes_no_second_mean_of_equal_learners(world):
    model = Vector(np.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    topology = Topology(world)
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology)
    model.x.grad = torch.full((2,), 0.1 * (world.Get_rank() + 1), dtype=torch.float64)
    averager.step()
    before = model.x.tolist()
    averager.finish()
    assert model.x.tolist() == before
    assert averager.totals.global_averages == 1
    topology.free()


class Counting(nn.Module):
    """A linear layer whose buffer follows the learner's own inputs in every forward pass in train mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("later", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.running.mul_(0.5).add_(x.detach().mean(dim=0))
            self.later.resize_(3).fill_(1.0)
        return self.linear(x)


@pytest.mark.parametrize("parted_by", ["forward", "load", "nothing"])
def test_what_parts_learners_after_the_last_mean_is_averaged(world, parted_by):
    """The mean of the last step is not taken for theirs: two mini-batches are left over, say."""
    rank, topology = world.Get_rank(), Topology(world)
    model = Counting()
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(1), topology)
    model(torch.full((2, 2), float(rank))).sum().backward()
    averager.step()
    if parted_by == "forward":
        model(torch.full((2, 2), float(rank)))
    elif parted_by == "load":
        model.load_state_dict({**model.state_dict(), "linear.bias": torch.tensor([float(rank)])})
    mean_rank = (world.Get_size() - 1) / 2
    with averager.mean_model():
        in_between = [value.tolist() for value in (model.running, model.linear.bias)]
    averager.finish()
    assert [value.tolist() for value in (model.running, model.linear.bias)] == in_between == world.bcast(in_between)
    if parted_by == "forward":
        assert model.running.tolist() == pytest.approx([1.5 * mean_rank] * 2)
    elif parted_by == "load":
        assert model.linear.bias.item() == pytest.approx(mean_rank)
    # The one mean of the step, and the final one where it is needed.
    assert averager.totals.global_averages == 1 + (parted_by != "nothing" and world.Get_size() > 1)
    topology.free()


@pytest.mark.parametrize("call", ["step", "finish", "reset_anchor"])
def test_the_model_that_is_lent_takes_no_steps(topology, call):
    """The block of `mean_model` ends with the parameters of before: what was done to them would be lost."""
    model = nn.Linear(2, 1)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(2), topology)
    model(torch.ones(1, 2)).sum().backward()
    averager.step()
    with averager.mean_model(), averager.mean_model(), pytest.raises(InputError, match=f"{call}=.*mean_model"):
        getattr(averager, call)()
    averager.step()
    averager.finish()


@pytest.mark.parametrize("options", ["mpi", {"engine": "mpi"}])
def test_options_that_are_none_are_refused(topology, options):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"options=.*: must be an AveragingOptions, or its fields by keyword"):
        Averager(model, optimizer, algorithms.k_avg(), topology, options)


# -- between nodes ------------------------------------------------------------------------------------------------


def large_averager(topology, **options):
    """Return an averager of 360 KB, for which the way between nodes is found by trial."""
    model = nn.Linear(300, 300)
    return Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(1), topology, **options)


def test_a_checkpoint_keeps_the_way_between_nodes(world):
    nodes = Nodes(world, None, "nodes of 1")
    state = large_averager(nodes).state_dict()
    assert len(state["crossings"]) == (world.Get_size() > 1)
    state["crossings"] = dict.fromkeys(state["crossings"], "chunks:1:60")
    again = large_averager(nodes)
    again.load_state_dict(state)
    assert again.state_dict()["crossings"] == state["crossings"]
    del state["crossings"]  # as an earlier version wrote it
    again.load_state_dict(state)
    given = large_averager(nodes, engine="twolevel", crossing="allreduce:1:64")
    given.load_state_dict({**state, "crossings": {"float32 up to 512 KiB": "chunks:1:60"}})
    assert given.state_dict()["crossings"] == {}  # it takes the way that it was given
    nodes.free()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crossing": "fast"}, "crossing='fast': must be allreduce:LANES, allreduce:LANES:KIB or chunks:LANES:KIB"),
        ({"crossing": "chunks:1"}, "crossing='chunks:1': must be"),
        ({"crossing": "allreduce:0"}, "crossing='allreduce:0': must be"),
        ({"crossing": "allreduce:1", "wire_dtype": "bfloat16"}, "crossing='allreduce:1': must be chunks:LANES:KIB"),
    ],
)
def test_ways_between_nodes_that_do_not_exist_are_refused(topology, options, message):
    with pytest.raises(InputError, match=message):
        large_averager(topology, engine="twolevel", **options)


def test_an_engine_without_ways_between_nodes_refuses_one(topology):
    if topology.num_learners == 1:
        assert large_averager(topology, engine="mpi", crossing="chunks:1:60").engine.crossings == {}
    else:
        with pytest.raises(InputError, match="crossing='chunks:1:60': must be left out with engine mpi"):
            large_averager(topology, engine="mpi", crossing="chunks:1:60")
