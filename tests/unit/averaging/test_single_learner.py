"""One learner is plain PyTorch, bit for bit (identity 1); policies and checkpoints on one rank."""

import contextlib
import math

import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, Topology, algorithms
from hpcavg.config.options import Config
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.errors import InputError, SickLearnersError
from hpcavg.models import build
from hpcavg.training import optimizers

RULES = {
    "sgd": algorithms.sgd(),
    "sync_sgd": algorithms.sync_sgd(),
    "sync_sgd gradients": algorithms.sync_sgd(variant="gradients"),
    "one_shot": algorithms.one_shot(),
    "k_avg": algorithms.k_avg(3),
    "hier_avg": algorithms.hier_avg(2, 5),
    "pr_sgd": algorithms.pr_sgd(3),
    "post_local_sgd": algorithms.post_local_sgd(4, 3),
    "pr_sgd_hetero": algorithms.pr_sgd_hetero(local_steps=[3]),
    "lupa": algorithms.lupa(3),
    "ada_lupa": algorithms.ada_lupa(2),
    "ada_lupa by loss": algorithms.ada_lupa(2, growth="loss"),
    "dasgd at once": algorithms.dasgd(3, delay=0, xi=0),
    "slowmo without momentum": algorithms.slowmo(3, beta=0),
    "diloco without momentum": algorithms.diloco(3, outer_lr=1, outer_momentum=0),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.fixture
def topology():
    made = Topology(MPI.COMM_SELF)
    yield made
    made.free()


def make(optimizer, seed=0):
    torch.manual_seed(seed)
    model = build("cnn", (1, 8, 8), 10)
    return model, OPTIMIZERS[optimizer](model.parameters())


def data(num_batches, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        inputs = torch.randn(8, 1, 8, 8, generator=generator)
        yield inputs, torch.randint(10, (8,), generator=generator)


def train(model, optimizer, step, batches):
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        step(loss)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_one_learner_is_a_hand_written_loop_bit_for_bit(rule, optimizer_name, topology):
    by_hand, optimizer = make(optimizer_name)
    train(by_hand, optimizer, lambda loss: optimizer.step(), data(12))
    model, optimizer = make(optimizer_name)
    averager = Averager(model, optimizer, rule, topology)
    train(model, optimizer, averager.step, data(12))
    averager.finish()
    for (name, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_one_learner_is_blended_with_its_own_past_by_dasgd(topology):
    by_hand, optimizer = make("sgd")
    train(by_hand, optimizer, lambda loss: optimizer.step(), data(12))
    model, optimizer = make("sgd")
    train(model, optimizer, Averager(model, optimizer, algorithms.dasgd(3, delay=1), topology).step, data(12))
    assert not torch.allclose(model[0].weight, by_hand[0].weight)


RATES = {  # of steps 1 to 12, by hand
    "pr_sgd_time_varying": (
        algorithms.pr_sgd_time_varying(),
        [0.1 * 1 / s ** (2 / 3) for s in (1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7)],
    ),
    "lupa": (algorithms.lupa(3, mu=8.0), [4 / (8.0 * (t + 7)) for t in range(12)]),
}


@pytest.mark.parametrize("name", RATES)
def test_one_learner_at_the_rates_of_the_theory_is_a_hand_written_loop_bit_for_bit(name, topology):
    rule, rates = RATES[name]
    by_hand, optimizer = make("sgd")
    remaining = iter(rates)

    def step_by_hand(loss):
        optimizer.param_groups[0]["lr"] = next(remaining)
        optimizer.step()

    train(by_hand, optimizer, step_by_hand, data(12))
    model, own_optimizer = make("sgd")
    averager = Averager(model, own_optimizer, rule, topology, total_steps=12)
    train(model, own_optimizer, averager.step, data(12))
    averager.finish()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_torchs_own_random_numbers_are_left_alone(topology):
    model, optimizer = make("sgd")
    before = torch.get_rng_state()
    Averager(model, optimizer, algorithms.sgd(), topology, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_mean_model_leaves_the_model_as_it_was(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.k_avg(4), topology)
    train(model, optimizer, averager.step, data(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_events = len(averager.events)
    with averager.mean_model() as mean:
        assert mean is model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(averager.events) == num_events


def test_resetting_the_optimizer_clears_its_state_at_global_means(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.hier_avg(1, 3), topology, optimizer_state="reset")
    train(model, optimizer, averager.step, data(2))
    assert len(optimizer.state) == len(list(model.parameters()))
    train(model, optimizer, averager.step, data(1))
    assert len(optimizer.state) == 0


def test_recomputed_statistics_are_those_of_the_batches(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.k_avg(2), topology, buffers="recompute")
    train(model, optimizer, averager.step, data(3))
    inputs = torch.randn(16, 1, 8, 8)
    averager.finish([inputs])
    seen = model[0](inputs)
    assert torch.allclose(model[1].running_mean, seen.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var, seen.var(dim=(0, 2, 3)), atol=1e-5)


def test_recompute_without_batches_is_refused(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.sgd(), topology, buffers="recompute")
    with pytest.raises(InputError, match="batches"):
        averager.finish()


@pytest.mark.parametrize(
    "argument",
    [{"buffers": "some"}, {"optimizer_state": "some"}, {"non_finite": "some"}, {"engine": "fast"}],
    ids=lambda a: next(iter(a)),
)
def test_unknown_policies_are_refused(argument, topology):
    model, optimizer = make("sgd")
    with pytest.raises(InputError, match=r"'(some|fast)'"):
        Averager(model, optimizer, algorithms.sgd(), topology, **argument)


def test_options_are_taken_together_and_changed_by_name(topology):
    model, optimizer = make("sgd")
    options = AveragingOptions(buffers="keep", check_rounds=2, total_steps=1)
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology, options, total_steps=3)
    train(model, optimizer, averager.step, data(2))
    assert not averager.done
    train(model, optimizer, averager.step, data(1))
    assert averager.done
    with pytest.raises(TypeError, match="bufers"):
        Averager(model, optimizer, algorithms.k_avg(1), topology, bufers="keep")
    with pytest.raises(InputError, match=r"options='mpi': must be an AveragingOptions, .* engine='shared'"):
        Averager(model, optimizer, algorithms.k_avg(1), topology, "mpi")
    with pytest.raises(InputError, match="measure_distance='no': must be true or false"):
        Averager(model, optimizer, algorithms.k_avg(1), topology, measure_distance="no")


def test_the_topology_is_that_of_all_ranks_if_none_is_given():
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.k_avg(1))
    assert averager.topology.num_learners == 1
    averager.topology.free()


def test_a_name_is_no_algorithm(topology):
    model, optimizer = make("sgd")
    with pytest.raises(InputError, match=r"algorithms\.k_avg"):
        Averager(model, optimizer, "k_avg", topology)


def test_a_resumed_run_is_bit_identical(topology):
    whole, whole_optimizer = make("sgd")
    averager = Averager(whole, whole_optimizer, algorithms.hier_avg(2, 5), topology)
    train(whole, whole_optimizer, averager.step, data(9))

    model, optimizer = make("sgd")
    first = Averager(model, optimizer, algorithms.hier_avg(2, 5), topology)
    batches = list(data(9))
    train(model, optimizer, first.step, batches[:4])
    states = model.state_dict(), optimizer.state_dict(), first.state_dict()

    model, optimizer = make("sgd", seed=9)
    second = Averager(model, optimizer, algorithms.hier_avg(2, 5), topology)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    second.load_state_dict(states[2])
    train(model, optimizer, second.step, batches[4:])
    assert second.progress == averager.progress
    assert second.totals.global_averages == averager.totals.global_averages == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_state_of_another_rule_is_refused(topology):
    model, optimizer = make("sgd")
    state = Averager(model, optimizer, algorithms.k_avg(4), topology).state_dict()
    with pytest.raises(InputError, match="k_avg"):
        Averager(model, optimizer, algorithms.k_avg(5), topology).load_state_dict(state)


def test_a_skipped_amp_update_counts_as_a_step(topology):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, algorithms.k_avg(2), topology)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model.weight.detach().clone()
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
        averager.step(scaler=scaler)
        scaler.update()
        if value == float("inf"):
            assert torch.equal(model.weight, before)
    assert not torch.equal(model.weight, before)
    assert averager.progress.step == 2
    assert averager.totals.global_averages == 1


def test_a_closure_reaches_the_optimizer(topology):
    x = nn.Parameter(torch.tensor([4.0]))
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")
    averager = Averager(nn.Module(), optimizer, algorithms.k_avg(1), topology)

    def closure():
        optimizer.zero_grad()
        loss = ((x - 1) ** 2).sum()
        loss.backward()
        return loss

    averager.step(closure=closure)
    assert x.item() == pytest.approx(1.0)


def test_what_changes_under_the_averager_is_noticed(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(InputError, match="as when it was handed over"):
        averager.step()


def test_the_mean_model_puts_counters_back_where_statistics_are_recomputed(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.k_avg(5), topology, buffers="recompute")
    train(model, optimizer, averager.step, data(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with averager.mean_model([torch.randn(16, 1, 8, 8)]):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_no_number_is_refused(topology):
    model, optimizer = make("sgd")
    averager = Averager(model, optimizer, algorithms.ada_lupa(2, growth="loss"), topology)
    with pytest.raises(InputError, match="one number"):
        averager.step(torch.ones(4))


LARGEST = [math.nextafter(most, 0) for most in (1e30, 1e8)]
AT_THEIR_LARGEST = {
    "sgd": (algorithms.sgd(), {}),
    "adam": (algorithms.sgd(), {"optimizer": "adam"}),
    "adamw": (algorithms.sgd(), {"optimizer": "adamw"}),
    "slowmo": (algorithms.slowmo(1, outer_lr=LARGEST[1]), {}),
    "diloco": (algorithms.diloco(1, outer_lr=LARGEST[1]), {}),
    "lupa": (algorithms.lupa(1, mu=1e-15, shift=1e-15), {}),
    "restarts": (algorithms.pr_sgd_time_varying(), {}),
}


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize(("rule", "options"), AT_THEIR_LARGEST.values(), ids=AT_THEIR_LARGEST)
def test_what_options_allow_float32_can_hold(rule, options, smallest, topology):
    """The run diverges, and says so; that is another matter than a traceback out of torch."""
    rate, decay = (5e-324, 5e-324) if smallest else LARGEST
    model = nn.Linear(2, 1)
    config = Config(learning_rate=rate, weight_decay=decay, **options)
    optimizer = optimizers.build_optimizer(config.optimization, model.parameters())
    averager = Averager(model, optimizer, rule, topology)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with contextlib.suppress(SickLearnersError):
            averager.step()


@pytest.fixture
def process_group(tmp_path):
    """Let torch's own communication have a group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(how):
    model = nn.Sequential(nn.Linear(2, 2))
    if how == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    if how == "0 (DistributedDataParallel)":
        return nn.Sequential(nn.parallel.DistributedDataParallel(model), nn.Linear(2, 2))
    if how == "FullyShardedDataParallel":  # it needs a GPU, but for its name
        sharded = object.__new__(torch.distributed.fsdp.FullyShardedDataParallel)
        nn.Module.__init__(sharded)
        sharded._modules["_fsdp_wrapped_module"] = model
        return sharded
    if how == "DDP":
        from torch.distributed._composable.replicate import replicate

        return replicate(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    if how == "FSDPModule":
        return torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    from torch.distributed.tensor import parallel

    return parallel.parallelize_module(model, mesh, {"0": parallel.ColwiseParallel()})


PLAIN, WHOLE = (
    "the plain module, whose gradients nobody else",
    "a model that is whole on every rank: leave the sharding out",
)


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        ("DistributedDataParallel", PLAIN),
        ("0 (DistributedDataParallel)", PLAIN),
        ("DDP", "a module whose gradients nobody else averages: leave replicate out"),
        ("FullyShardedDataParallel", WHOLE),
        ("FSDPModule", WHOLE),
        ("0.weight (DTensor)", WHOLE),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it is about to change
def test_a_model_that_torch_averages_or_shards_is_refused_by_name(topology, process_group, how, allowed):
    model = wrapped(how)
    with pytest.raises(InputError) as caught:
        Averager(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), algorithms.k_avg(3), topology)
    assert str(caught.value).startswith(f"model={how!r}: must be {allowed}")
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore")
def test_the_module_of_a_wrapper_is_averaged(topology, process_group):
    wrapper = wrapped("DistributedDataParallel")
    for model in (wrapper.module, nn.DataParallel(nn.Linear(2, 2))):  # which keeps to this process
        averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(1), topology)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model(torch.ones(3, 2)).sum().backward()
        averager.step()
        averager.finish()
        assert not any(map(torch.equal, before, model.parameters()))
