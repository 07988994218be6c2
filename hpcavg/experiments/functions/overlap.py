"""How much of a delayed mean is hidden: measured in the averager, with a wire that takes a known time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mpi4py import MPI

from hpcavg import algorithms, models
from hpcavg.averaging.averager import Averager
from hpcavg.data.mnist1d import LENGTH
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, PendingMean
from hpcavg.engines.pending import SteppedMean, Work
from hpcavg.experiments.run import Result

_CLASSES = 10


def overlap(
    comm: MPI.Intracomm,
    folder: Path,
    seed: int,
    tau: int,
    delay: int,
    rounds: int,
    mean_steps: float,
    model: str,
    batch_size: int,
) -> Result:
    """Train with DaSGD on one rank, whose means take a known time; measure steps, means and waits. One rank does it.

    A mean of one rank needs no wire. Here it also waits until its time is over, as if other ranks were slow to answer.

    Parameters
    ----------
    comm : the ranks of the run.
    folder : of the run's records; there are none.
    seed : of the samples.
    tau : steps between means.
    delay : steps from the start of a mean to its merge, below `tau` - 1: the steps after them, but the last, have no
        mean in flight, and show how long a step takes.
    rounds : of `tau` steps.
    mean_steps : how long a mean takes, in steps, which are measured in the round before it.
    model : a network for signals.
    batch_size : of the steps.

    Returns
    -------
    Result
        Lists with a value for each round, in seconds: ``step_s``, the median of its steps without a mean in flight;
        ``mean_s``, from start to end of its mean; ``blocked_s``, in which the mean kept the learner from computing;
        ``round_s``, its `tau` steps.
    """
    if comm.Get_rank() != 0:
        return {}
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch_size, 1, LENGTH, generator=generator)
    targets = torch.randint(_CLASSES, (batch_size,), generator=generator)
    network = models.build(model, (1, LENGTH), _CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    times: list[float] = []  # of the steps of this round

    def step() -> None:
        started = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), targets).backward()
        averager.step()
        times.append(time.perf_counter() - started)

    def step_s() -> float:
        return statistics.median(times[delay : tau - 1])

    steps_s, rounds_s = [], []
    topology = Topology(MPI.COMM_SELF)
    try:
        averager = Averager(network, optimizer, algorithms.dasgd(tau=tau, delay=delay, xi=0.25), topology)
        with mock.patch.object(averager.engine, "start", slowly(averager.engine, lambda: mean_steps * step_s())):
            for _ in range(rounds + 1):
                times.clear()
                for _ in range(tau):
                    step()
                steps_s.append(step_s())
                rounds_s.append(sum(times))
            averager.finish()
    finally:
        topology.free()
    means = list(averager.events)[:rounds]  # that of a round was started at the end of the round before
    return {
        "step_s": steps_s[1:],
        "mean_s": [event.in_flight_s for event in means],
        "blocked_s": [event.blocked_s for event in means],
        "round_s": rounds_s[1:],
    }


def slowly(engine: Engine, wire_s: Callable[[], float]) -> Callable[..., PendingMean]:
    """Return a function that starts a mean of `engine` which takes longer, in the background.

    Parameters
    ----------
    engine : takes the mean.
    wire_s : returns by how many seconds.
    """
    start = engine.start

    def start_slowly(*arguments: Any) -> PendingMean:
        mean, end_s = start(*arguments), time.perf_counter() + wire_s()
        return SteppedMean(itertools.chain(_until(end_s), _rest(mean)), mean.wait)

    return start_slowly


def _until(end_s: float) -> Work:
    while time.perf_counter() < end_s:
        yield False


def _rest(mean: PendingMean) -> Work:
    while not mean.test():
        yield False
