"""Faults that are planted in the package: for each of them, the verdict of an experiment becomes another.

The experiments are shrunk to their quick scale, and seeded.
"""

import pytest
from mpi4py import MPI

from hpcavg import Averager, Topology
from hpcavg.averaging.delayed import DelayedAveraging
from hpcavg.averaging.simulated_servers import SimulatedServers
from hpcavg.averaging.stacked_optimizer import StackedOptimizer
from hpcavg.experiments import registry
from hpcavg.experiments.experiment import Results, Scale
from hpcavg.experiments.verdict import Verdict


def average_over_all_learners(monkeypatch):
    """Let a local mean be that of all learners of the rank."""
    build = Topology.__init__

    def make(self, *args, **options):
        build(self, *args, **options)
        self.groups_here = [slice(0, self.learners_per_rank)]

    monkeypatch.setattr(Topology, "__init__", make)


def average_over_the_first_group(monkeypatch):
    """Let every group of the rank get the mean of the first one."""
    build = Topology.__init__

    def make(self, *args, **options):
        build(self, *args, **options)
        self.groups_here = [self.groups_here[0]] * len(self.groups_here)

    monkeypatch.setattr(Topology, "__init__", make)


def average_over_half_a_group(monkeypatch):
    """Let a local mean be that of a half of the group."""
    build = Topology.__init__

    def make(self, *args, **options):
        build(self, *args, **options)
        halves = [(group.start, (group.start + group.stop) // 2, group.stop) for group in self.groups_here]
        self.groups_here = [
            slice(*ends) for first, middle, last in halves for ends in ((first, middle), (middle, last))
        ]

    monkeypatch.setattr(Topology, "__init__", make)


def take_snapshots_late(monkeypatch):
    """Take the snapshot of a delayed mean one step late, and merge the mean when it is due."""
    step, start = Averager.step, DelayedAveraging.start
    due = {}

    def postpone(self, progress):
        due[self] = progress.step

    def step_and_start(self, *args, **options):
        step(self, *args, **options)
        if due.get(self._delayed) == self.progress.step - 1:
            start(self._delayed, self.progress)
            self._delayed._delayed.flight.step -= 1

    monkeypatch.setattr(DelayedAveraging, "start", postpone)
    monkeypatch.setattr(Averager, "step", step_and_start)


def lose_updates(monkeypatch):
    """Lose one update of twenty on its way to the server."""
    apply, sent = SimulatedServers._apply, []

    def apply_most(self, row, update):
        sent.append(row)
        if len(sent) % 20:
            apply(self, row, update)

    monkeypatch.setattr(SimulatedServers, "_apply", apply_most)


def keep_the_rate_of_one_learner(monkeypatch):
    """Let the first learner of the rank step with the rate of the first step for ever."""
    step, first = StackedOptimizer.step, {}

    def step_unevenly(self, rows, *args):
        (group,) = self.optimizer.param_groups
        for parameter in group["params"]:
            parameter.grad[0] *= first.setdefault(self, group["lr"]) / group["lr"]
        step(self, rows, *args)

    monkeypatch.setattr(StackedOptimizer, "step", step_unevenly)


FAULTS = {
    average_over_all_learners: "hier-avg-dispersion",
    average_over_the_first_group: "hier-avg-dispersion",
    average_over_half_a_group: "hier-avg-dispersion",
    take_snapshots_late: "dasgd-update-rule",
    lose_updates: "k-avg-asgd-linear-speed-up",
    keep_the_rate_of_one_learner: "pr-sgd-algorithm-2",
}
SEEDS = 4


def verdict_of(experiment, folder):
    runs = experiment.runs(Scale(SEEDS, is_quick=True))
    results = {arm: [run(MPI.COMM_SELF, folder) for run in of_arm] for arm, of_arm in runs.items()}
    return experiment.judge(Results(results)).judgement


@pytest.fixture(scope="module")
def experiments():
    return registry.experiments()


@pytest.mark.parametrize("name", sorted(set(FAULTS.values())))
def test_without_a_fault_the_claim_holds(tmp_path, experiments, name):
    judgement = verdict_of(experiments[name], tmp_path)
    assert judgement.verdict is Verdict.HOLDS, judgement.statistics


@pytest.mark.parametrize(("plant", "name"), FAULTS.items(), ids=lambda each: getattr(each, "__name__", each))
def test_with_a_fault_the_claim_does_not_hold(tmp_path, monkeypatch, experiments, plant, name):
    plant(monkeypatch)
    judgement = verdict_of(experiments[name], tmp_path)
    print(*judgement.statistics, sep="\n")
    assert judgement.verdict is Verdict.FAILS, judgement.statistics
