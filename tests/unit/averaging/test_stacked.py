"""A stacked model against as many models of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hpcavg import InputError, stack
from hpcavg.averaging.stacked_optimizer import StackedOptimizer

LEARNERS, BATCH = 3, 4


class Replacing(nn.Module):
    """Replaces its buffer in each step; a mask decides with a number, which vmap refuses."""

    def __init__(self, asks=False):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.asks = asks
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        if self.asks and x.sum().item() > 1e9:
            return self.layer(-x)
        return self.layer(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x))


class Images(nn.Module):
    """All that is done for images of many channels; some images and weights are the same for all learners."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.first(x.view(-1, 1, 2, 3))), inplace=True)
        ramp = torch.arange(12, dtype=x.dtype).view(1, 1, 3, 4)
        x = x + self.first(ramp[..., :2, :3]) + nn.functional.conv2d(ramp, torch.ones(4, 1, 1, 1, dtype=x.dtype))
        x = self.second(nn.functional.max_pool2d(x, 2, stride=1))
        x = nn.functional.adaptive_avg_pool2d(x + nn.functional.avg_pool2d(x, 1), (1, 2))
        return self.last(x.flatten(1))


class Viewing(nn.Module):
    """Its images are in the order that `view` needs, also after a layer for many channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.first(x.view(-1, 1, 2, 3)))
        return self.last(x.view(x.size(0), -1))


class Slices(nn.Module):
    """Its statistics are parts of a buffer, or no buffer at all."""

    def __init__(self, are_kept):
        super().__init__()
        self.last, self.are_kept = nn.Linear(6, 3), are_kept
        own = torch.stack([torch.zeros(3), torch.ones(3)]).double()
        if are_kept:
            self.register_buffer("own", own)
        else:
            self.own = own

    def forward(self, x):
        training = self.training or self.are_kept
        return nn.functional.batch_norm(self.last(x), self.own[0], self.own[1], training=training)


class Twice(nn.Module):
    """A module has two names, a tensor is the same for all learners."""

    def __init__(self):
        super().__init__()
        self.one = self.other = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, x):
        same = nn.functional.avg_pool2d(torch.ones(1, 1, 2, 2, dtype=x.dtype, requires_grad=True), 2)
        return self.other(self.one(x)) + same.flatten()


MODELS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
    "images": Images,
    "GroupNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 3)
    ),
    "a view": Viewing,
    "parts of a buffer": lambda: Slices(are_kept=True),
    "statistics that are no buffer": lambda: Slices(are_kept=False),
    "two names": Twice,
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)),
    "tied": Tied,
    "a buffer that is replaced": Replacing,
    "a number from a tensor": lambda: Replacing(asks=True),
    "frozen": lambda: nn.Sequential(nn.Linear(6, 3).requires_grad_(False), nn.Linear(3, 3)),
}
IN_A_LOOP = {
    "dropout": "random",
    "a number from a tensor": "item",
    "parts of a buffer": "view",
    "statistics that are no buffer": "view",
}


def make(name):
    """Return a stack whose learners differ, and the learners as models of their own."""
    torch.manual_seed(5)
    model = MODELS[name]().double()
    singles = [copy.deepcopy(model) for _ in range(LEARNERS)]
    stacked = stack(model, LEARNERS)
    stacked.random_states = [torch.Generator().manual_seed(row).get_state() for row in range(LEARNERS)]
    with torch.no_grad():
        for row, single in enumerate(singles):
            for parameter in single.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            stacked.load_state_dict_of(row, single.state_dict())
    return stacked, singles


def batches(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(LEARNERS, BATCH, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (LEARNERS, BATCH), generator=generator)


@pytest.mark.parametrize("way", ["backward", "gradients"])
@pytest.mark.parametrize("name", MODELS)
def test_every_learner_is_what_it_is_on_its_own(name, way):
    stacked, singles = make(name)
    states = list(stacked.random_states)
    trained = [parameter for parameter in stacked.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    others = [torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.1, momentum=0.9) for s in singles]
    for step in range(3):
        inputs, targets = batches(step)
        optimizer.zero_grad()
        if way == "backward":
            losses = stacked.each(cross_entropy, stacked(inputs), targets)
            losses.sum().backward()
        else:
            losses = stacked.gradients(cross_entropy, inputs, targets)
        optimizer.step()
        for row, single in enumerate(singles):
            torch.set_rng_state(states[row])
            others[row].zero_grad()
            loss = cross_entropy(single(inputs[row]), targets[row])
            loss.backward()
            others[row].step()
            states[row] = torch.get_rng_state()
            assert losses[row].item() == pytest.approx(loss.item(), rel=1e-14)
    for row, single in enumerate(singles):
        found, expected = stacked.state_dict_of(row), single.state_dict()
        assert list(found) == list(expected)
        for name_of, tensor in expected.items():
            assert torch.allclose(found[name_of], tensor, rtol=1e-13, atol=1e-15), name_of
    if name in IN_A_LOOP:
        assert IN_A_LOOP[name] in stacked.why_loop
    else:
        assert stacked.why_loop is None


@pytest.mark.parametrize("name", ["BatchNorm", "dropout"])
@pytest.mark.parametrize("way", ["backward", "gradients"])
def test_learners_that_wait_stay_as_they_are(name, way):
    stacked, _ = make(name)
    stacked.active = [0, 2]
    states, before = list(stacked.random_states), stacked.state_dict_of(1)
    inputs, targets = batches(0)
    if way == "backward":
        stacked.each(cross_entropy, stacked(inputs), targets).sum().backward()
    else:
        losses = stacked.gradients(cross_entropy, inputs, targets)
        assert losses.isnan().tolist() == [False, True, False]
    assert all(not parameter.grad[1].any() for parameter in stacked.parameters())
    everyone, singles = make(name)
    everyone.gradients(cross_entropy, inputs, targets)
    for parameter, other in zip(stacked.parameters(), everyone.parameters(), strict=True):
        assert torch.allclose(parameter.grad[[0, 2]], other.grad[[0, 2]], rtol=1e-13, atol=1e-15)
    assert torch.allclose(stacked.eval()(inputs)[1], singles[1].eval()(inputs[1]), rtol=1e-13)
    assert all(torch.equal(value, stacked.state_dict_of(1)[key]) for key, value in before.items())
    assert torch.equal(states[1], stacked.random_states[1])


def test_channels_are_innermost():
    images = torch.ones(LEARNERS, BATCH, 1, 5, 5)
    assert stack(nn.Conv2d(1, 4, 3), LEARNERS)(images).stride()[2] == 1


def test_hooks_are_called_by_both_ways():
    stacked, _ = make("perceptron")
    for parameter in stacked.parameters():
        parameter.register_hook(torch.zeros_like)
    stacked.gradients(cross_entropy, *batches(0))
    assert not any(parameter.grad.any() for parameter in stacked.parameters())
    hooked = nn.Linear(2, 2)
    hooked.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(InputError, match="weight with a hook"):
        stack(hooked, 2)


def test_a_parameter_that_one_learner_does_not_use_is_refused():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return (self.one if x.sum().item() > 0 else self.other)(x)

    stacked = stack(Choosing(), 2)
    inputs = torch.stack([torch.ones(BATCH, 6), -torch.ones(BATCH, 6)])
    with pytest.raises(InputError, match="the same parameters each time"):
        stacked.gradients(cross_entropy, inputs, torch.zeros(2, BATCH, dtype=torch.int64))


def test_padding_gets_no_gradient():
    stacked = stack(nn.Embedding(4, 2, padding_idx=0), 2)
    stacked(torch.tensor([[0, 1], [0, 2]])).sum().backward()
    assert stacked.module.weight.grad.sum(dim=2).tolist() == [[0, 2, 0, 0], [0, 0, 2, 0]]
    assert "padding" in stacked.why_loop
    with pytest.raises(InputError, match="sparse=True"):
        stack(nn.Sequential(nn.Embedding(4, 2, sparse=True)), 2)


@pytest.mark.parametrize("learners", [2, 4])
def test_other_numbers_of_learners_are_refused(learners):
    stacked, _ = make("perceptron")
    inputs, targets = (torch.cat([each, each])[:learners] for each in batches(0))
    for call in (lambda: stacked(inputs), lambda: stacked.gradients(cross_entropy, inputs, targets)):
        with pytest.raises(InputError, match="for as many learners"):
            call()


def test_gradients_are_added():
    stacked, _ = make("perceptron")
    inputs, targets = batches(0)
    stacked.gradients(cross_entropy, inputs, targets)
    once = [parameter.grad.clone() for parameter in stacked.parameters()]
    stacked.gradients(cross_entropy, inputs, targets)
    assert all(torch.equal(parameter.grad, 2 * g) for parameter, g in zip(stacked.parameters(), once, strict=True))


def test_random_numbers_may_be_drawn_at_once():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    stacked = stack(model, LEARNERS, randomness="fast")
    outputs = stacked(torch.ones(LEARNERS, 50, 6))
    assert stacked.why_loop is None
    assert not torch.equal(outputs[0], outputs[1])


def test_the_errors_of_a_model_are_its_own():
    stacked, _ = make("perceptron")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        stacked(torch.ones(LEARNERS, BATCH, 7, dtype=torch.float64))
    with pytest.raises(InputError, match="learners=0"):
        stack(nn.Linear(2, 2), 0)
    with pytest.raises(InputError, match="randomness='none'"):
        stack(nn.Linear(2, 2), 2, randomness="none")
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(InputError, match="mask of layout"):
        stack(sparse, 2)
    with pytest.raises(RuntimeError, match="shape"):
        stacked.load_state_dict_of(0, {name: value[:1] for name, value in stacked.state_dict_of(0).items()})


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_learner_has_its_own_optimizer(name):
    """One is forgotten on the way; the states are saved and loaded, by learner, before and after that."""
    torch.manual_seed(1)
    values = torch.randn(LEARNERS, 4, 3, dtype=torch.float64)
    whole, singles = nn.Parameter(values.clone()), [nn.Parameter(row.clone()) for row in values]
    stacked = StackedOptimizer(OPTIMIZERS[name]([whole]), LEARNERS, own_pace=False)
    own = [OPTIMIZERS[name]([single]) for single in singles]

    def step():
        gradients = torch.randn_like(values)
        whole.grad = gradients.clone()
        stacked.step(range(LEARNERS))
        for single, optimizer, gradient in zip(singles, own, gradients, strict=True):
            single.grad = gradient
            optimizer.step()
        assert torch.allclose(whole.data, torch.stack([single.data for single in singles]), rtol=1e-13)

    def check_states():
        states = [stacked.state_dict_of(row) for row in range(LEARNERS)]
        for state, optimizer in zip(states, own, strict=True):
            expected = optimizer.state_dict()
            assert state["param_groups"] == expected["param_groups"]
            for key, value in expected["state"].get(0, {}).items():
                assert torch.allclose(torch.as_tensor(state["state"][0][key]), torch.as_tensor(value), rtol=1e-12), key
        return states

    step()
    step()
    states = check_states()
    stacked.forget([1])
    own[1].state.clear()
    singles[1].grad.zero_()
    step()
    check_states()
    stacked.clear()
    stacked.load_state_dicts(states)
    for optimizer, state in zip(own, states, strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    step()
    check_states()


@pytest.mark.parametrize("name", ["Adam", "Adafactor"])
def test_a_scheduler_steps_nothing_of_its_own(name):
    torch.manual_seed(1)
    values = torch.randn(LEARNERS, 4, 3)
    whole, singles = nn.Parameter(values.clone()), [nn.Parameter(row.clone()) for row in values]
    optimizer, own = OPTIMIZERS[name]([whole]), [OPTIMIZERS[name]([single]) for single in singles]
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, *own)]
    stacked = StackedOptimizer(optimizer, LEARNERS, own_pace=False)
    for step in range(5):
        whole.grad = torch.randn_like(values)
        for single, gradient in zip(singles, whole.grad.clone(), strict=True):
            single.grad = gradient
        if step == 2:
            stacked.forget([1])
            own[1].state.clear()
            singles[1].grad.zero_()
        stacked.step(range(LEARNERS))
        for each in own:
            each.step()
        for scheduler in schedulers:
            scheduler.step()
    assert torch.allclose(whole.data, torch.stack([single.data for single in singles]), rtol=1e-5)


def test_fused_steps_are_taken_by_learner():
    memory = torch.zeros(2, 32)
    parameter = nn.Parameter(memory.as_strided((2, 3), (32, 1)))
    parameter.grad = torch.ones(2, 3)
    StackedOptimizer(torch.optim.SGD([parameter], lr=1.0, fused=True), 2, own_pace=False).step([0, 1])
    assert memory[:, :4].tolist() == [[-1.0, -1.0, -1.0, 0.0]] * 2


def test_an_optimizer_that_is_split_follows_the_options_of_the_whole():
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    stacked = StackedOptimizer(optimizer, 2, own_pace=True)
    optimizer.param_groups[0]["lr"] = 1.0
    parameter.grad = torch.ones(2, 3)
    stacked.step([1])
    assert parameter.tolist() == [[0.0] * 3, [-1.0] * 3]
