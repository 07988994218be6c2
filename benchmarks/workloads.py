"""Learners to measure: a workload trained by an algorithm of hpcavg, by DistributedDataParallel, or alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks import common
from hpcavg import Averager, InputError, Topology, algorithms, models
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.data.partition import batches, shard
from hpcavg.distributed.shared_memory import share_array
from hpcavg.tasks import Data, count_correct, digits

Batch = tuple[Tensor, Tensor]
_LONGEST_PERIOD = 10**6


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes
    ----------
    name : for the table.
    build : returns a new model.
    learning_rate : of SGD.
    momentum : of SGD.
    batches : takes (learners, learner, batch size) and yields the learner's mini-batches without end.
    num_train : the number of training samples; None for noise.
    test : the samples for the accuracy; None for noise.
    """

    name: str
    build: Callable[[], nn.Module]
    learning_rate: float
    momentum: float
    batches: Callable[[int, int, int], Iterator[Batch]]
    num_train: int | None = None
    test: Batch | None = None


def digits_workload(topology: Topology, model: str = "cnn") -> Workload:
    """Return the embedded task, digits, with its data held once per node. Collective."""
    own: Any = digits.load_data() if topology.node_rank == 0 else None
    fields = range(len(Data._fields))
    arrays = (share_array(topology.node, None if own is None else own[field]) for field in fields)
    train_x, train_y, test_x, test_y = map(torch.from_numpy, arrays)

    def draw(learners: int, learner: int, batch_size: int) -> Iterator[Batch]:
        for epoch in itertools.count():
            for index in batches(shard(len(train_x), learners, learner, batch_size, 0, epoch), batch_size):
                yield train_x[index], train_y[index]

    return Workload(
        "digits", lambda: models.build(model, (1, 8, 8), 10), 0.05, 0.9, draw, len(train_x), (test_x, test_y)
    )


def mlp(width: int) -> nn.Module:
    """Return a perceptron of four square layers without bias, with 4 width² parameters."""
    return nn.Sequential(
        *itertools.chain.from_iterable((nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(4))
    )


def mlp_workload(num_parameters: float) -> Workload:
    """Return a perceptron of about `num_parameters` on noise, for throughput only."""
    width = max(1, round((num_parameters / 4) ** 0.5))

    def draw(learners: int, learner: int, batch_size: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(learner)
        noise = torch.randn(4, batch_size, width, generator=generator)
        labels = torch.randint(width, (4, batch_size), generator=generator)
        return itertools.cycle(zip(noise, labels, strict=True))

    return Workload(f"mlp of {4 * width**2:.3g} parameters", lambda: mlp(width), 0.001, 0.0, draw)


class Learner:
    """The learner of one rank.

    Parameters
    ----------
    workload : Workload
        What it learns.
    rule : Rule, "ddp" or None
        An algorithm of hpcavg, torch's DistributedDataParallel, or plain SGD on this rank alone.
    topology : Topology
        The ranks. Plain SGD does not communicate.
    batch_size : int
        Samples of a mini-batch.
    engine : str
        How means are taken.
    """

    def __init__(
        self, workload: Workload, rule: Rule | str | None, topology: Topology, batch_size: int, engine: str = "auto"
    ) -> None:
        torch.manual_seed(0)
        self._model: nn.Module = workload.build()
        self._optimizer = torch.optim.SGD(self._model.parameters(), workload.learning_rate, workload.momentum)
        self.batch_size, self._test = batch_size, workload.test
        self.averager: Averager | None = None
        self._step: Callable[[Tensor], None] = lambda loss: self._optimizer.step()
        if isinstance(rule, Rule):
            self.averager = Averager(self._model, self._optimizer, rule, topology, engine=engine, batch_size=batch_size)
            self._step = self.averager.step
        elif rule is not None:
            self._model = DistributedDataParallel(self._model)
        share = (1, 0) if rule is None else (topology.num_learners, topology.rank)
        self._batches = workload.batches(*share, batch_size)

    def train(self, steps: int) -> None:
        """Take `steps` steps."""
        for _ in range(steps):
            inputs, targets = next(self._batches)
            self._optimizer.zero_grad()
            loss = cross_entropy(self._model(inputs), targets)
            loss.backward()
            self._step(loss.detach())

    def accuracy(self) -> float:
        """Return the mean model's accuracy on the test samples. Collective."""
        assert self._test is not None
        inputs, targets = self._test
        self._model.eval()
        with torch.no_grad():
            if self.averager is None:
                correct = count_correct(self._model(inputs), targets)
            else:
                with self.averager.mean_model() as model:
                    correct = count_correct(model(inputs), targets)
        self._model.train()
        return float(correct) / len(targets)


@dataclass(frozen=True)
class Throughput:
    """What was measured over a whole number of global periods.

    Attributes
    ----------
    samples_per_s : samples of all learners per second.
    steps : steps of one learner.
    means : global means.
    blocked : the share of the time in which averaging blocked the learners.
    hidden : the share of the flight time of delayed means in which learners were not blocked; None without such means.
    """

    samples_per_s: float
    steps: int
    means: int
    blocked: float
    hidden: float | None


def check_rule(rule: Rule) -> Rule:
    """Return `rule`; raise `InputError` if its learners do not take the same steps between means."""
    if rule.server is not None or rule.own_pace:
        raise InputError("algorithms", rule.name, "algorithms whose learners take the same steps and have no servers")
    return rule


def first_period(rule: Rule | str | None, num_learners: int) -> int:
    """Return the steps up to the first global mean; 1 if there is none."""
    if not isinstance(rule, Rule) or rule.name in ("sgd", "one_shot"):
        return 1
    due = rule.when(Run(num_learners))
    return next(step for step in range(1, _LONGEST_PERIOD) if due(Progress(step=step)) is GLOBAL)


def throughput(learner: Learner, rule: Rule | str | None, comm: MPI.Comm, seconds: float) -> Throughput:
    """Train for about `seconds` of computation, a whole number of global periods, and return what was measured.

    Collective. The first steps warm up and tell the time of a step. They are as many as a mean is delayed, so the
    following n periods contain n starts and n merges.
    """
    warm_up = max(2, rule.delay_steps) if isinstance(rule, Rule) else 2
    step_s = common.slowest_s(comm, lambda: learner.train(warm_up)) / warm_up
    period = first_period(rule, comm.Get_size())
    steps = period * max(1, round(seconds / (period * step_s)))
    totals = None if learner.averager is None else learner.averager.totals
    before = (0, 0.0, 0.0) if totals is None else (totals.global_averages, totals.blocked_s, totals.in_flight_s)
    wall_s = common.slowest_s(comm, lambda: learner.train(steps))
    after = before if totals is None else (totals.global_averages, totals.blocked_s, totals.in_flight_s)
    means, blocked_s, in_flight_s = (b - a for a, b in zip(before, after, strict=True))
    blocked_s, in_flight_s = (comm.allreduce(value) / comm.Get_size() for value in (blocked_s, in_flight_s))
    is_delayed = isinstance(rule, Rule) and rule.delay_steps and in_flight_s > 0
    return Throughput(
        comm.Get_size() * steps * learner.batch_size / wall_s,
        steps,
        int(means),
        blocked_s / wall_s,
        max(0.0, 1 - blocked_s / in_flight_s) if is_delayed else None,
    )


def build_rule(name: str, options: Mapping[str, object]) -> Rule:
    """Return the rule of the algorithm `name`, with those of the `options` that it has and that are set."""
    if name not in algorithms.ALGORITHMS:
        raise InputError("algorithms", name, f"one of {', '.join(algorithms.ALGORITHMS)}")
    taken = {option: options[option] for option in algorithms.option_names(name) if options.get(option) is not None}
    return check_rule(algorithms.build(name, taken))
