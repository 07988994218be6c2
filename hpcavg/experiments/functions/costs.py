"""Simulated time of K-AVG and of a parameter server, from measured costs of computing and assumed ones of a network."""

from __future__ import annotations

import heapq
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.experiments.run import Result

_REPEATS = 300


def simulate(
    comm: MPI.Intracomm,
    folder: Path,
    seed: int,
    learners: Sequence[int],
    k: int,
    rounds: int,
    bytes_per_s: float,
    latency_s: float,
    spread: float,
    **options: Any,
) -> Result:
    """Measure a step of one learner and a sum of two models; simulate runs with several learners. One rank does it.

    Parameters
    ----------
    comm : the ranks of the run.
    folder : not used.
    seed : of the network and of the durations of steps.
    learners : the numbers of learners of the simulated runs.
    k : steps between means, and between exchanges with the server.
    rounds : of `k` steps of every learner.
    bytes_per_s : assumed bandwidth of a link, in each direction.
    latency_s : assumed time of a message without contents.
    spread : of the durations of steps: the standard deviation of their logarithms; see `hpcavg.AveragingOptions`.
    **options : of ``python -m hpcavg``: the task, its network and the batch.

    Returns
    -------
    Result
        ``step_s`` and ``sum_s``, measured; ``num_bytes`` of the model; ``learners``; by number of learners ``k_avg_s``,
        ``downpour_s``, ``eamsgd_s`` and ``sgd_s``, the simulated times in which the learners take all their steps, the
        last of one learner that takes the steps of all.
    """
    if comm.Get_rank() != 0:
        return {}
    step_s, sum_s, num_elements = _measure(seed, Config(**options))
    transfer_s = 4 * num_elements / bytes_per_s
    generator = np.random.default_rng(seed)
    times: dict[str, list[float]] = {"k_avg_s": [], "downpour_s": [], "eamsgd_s": [], "sgd_s": []}
    for number in learners:
        # The mean duration is step_s.
        steps = generator.lognormal(-(spread**2) / 2, spread, (rounds, k, number))
        work = step_s * steps.sum(axis=1)
        times["k_avg_s"].append(synchronous(work, mean_s(number, transfer_s, latency_s, sum_s)))
        # A learner of EAMSGD computes the difference from the centre and takes it off its own parameters.
        for name, own_s in (("downpour_s", 0.0), ("eamsgd_s", 2 * sum_s)):
            waits = 2 * latency_s + transfer_s
            times[name].append(with_server(work + own_s, transfer_s + sum_s, waits))
        times["sgd_s"].append(float(work.sum()))
    return {"step_s": step_s, "sum_s": sum_s, "num_bytes": 4 * num_elements, "learners": list(learners), **times}


def mean_s(learners: int, transfer_s: float, latency_s: float, sum_s: float) -> float:
    """Return the time of a mean over the learners: halves, quarters and so on are exchanged and summed, and return.

    This is the algorithm of Rabenseifner (2004).

    Parameters
    ----------
    learners : how many.
    transfer_s : time in which a link carries the model.
    latency_s : time of a message without contents.
    sum_s : time in which two models are summed.
    """
    part = (learners - 1) / learners
    return 2 * math.ceil(math.log2(learners)) * latency_s + part * (2 * transfer_s + sum_s)


def synchronous(work: NDArray[Any], pause_s: float) -> float:
    """Return the time of rounds that wait for the slowest learner, and then pause.

    Parameters
    ----------
    work : durations, shape (rounds, learners).
    pause_s : the time of a mean.
    """
    return float(work.max(axis=1).sum()) + len(work) * pause_s


def with_server(work: NDArray[Any], service_s: float, waits_s: float) -> float:
    """Return the time until the last learner has ended its rounds. Each exchanges with one server after each round.

    Parameters
    ----------
    work : durations, shape (rounds, learners).
    service_s : time that an exchange occupies the server. It serves learners in the order in which they come.
    waits_s : further time that the learner waits.
    """
    rounds, learners = work.shape
    arrivals = [(work[0, learner], learner, 1) for learner in range(learners)]
    heapq.heapify(arrivals)
    free_s = end_s = 0.0
    while arrivals:
        time_s, learner, done = heapq.heappop(arrivals)
        free_s = max(free_s, time_s) + service_s
        end_s = max(end_s, free_s + waits_s)
        if done < rounds:
            heapq.heappush(arrivals, (free_s + waits_s + work[done, learner], learner, done + 1))
    return end_s


def _measure(seed: int, config: Config) -> tuple[float, float, int]:
    """Return the time of a training step of one learner, that of a sum of two models, and their number of elements."""
    task = tasks.load(config)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model, data = task.build_model(), task.load_data()
    batch = np.arange(config.run.batch_size)
    inputs, targets = (torch.as_tensor(part[batch]) for part in (data.train_inputs, data.train_targets))
    optimizer = torch.optim.SGD(model.parameters(), config.optimization.learning_rate)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()

    num_elements = sum(parameter.numel() for parameter in model.parameters())
    total, other = torch.zeros(num_elements), torch.zeros(num_elements)
    return _median_s(step), _median_s(lambda: total.add_(other)), num_elements


def _median_s(action: Callable[[], object]) -> float:
    """Return the time that an action takes: the median of many, which other processes disturb least."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
