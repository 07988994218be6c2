"""Totals of a rank over a run, and the run's summary made from those of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import tensor_file
from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.results.summary import Summary
from hpcavg.training.evaluation import Evaluation
from hpcavg.training.learners import Learners


@dataclass
class RunTotals:
    """What this rank did, apart from its averages. A resumed run continues with it.

    Attributes
    ----------
    samples : list of int
        Training samples of each learner.
    consensus_distance : list of float
        The last one measured of each learner; NaN if none was.
    compute_s : float
        Seconds in passes and optimizer steps.
    data_s : float
        Seconds waiting for mini-batches.
    evaluation_s : float
        Seconds in evaluations.
    checkpoint_s : float
        Seconds in checkpoints.
    arrivals : int
        Updates that this server, or the simulated one, applied.
    staleness_sum : int
        Sum of their staleness.
    staleness_max : int
        The largest staleness.
    startup_s : float
        Seconds from the start of the process to the training, over all segments.
    wall_s : float
        Seconds of training, of earlier segments.
    """

    samples: list[int] = field(default_factory=lambda: [0])
    consensus_distance: list[float] = field(default_factory=lambda: [math.nan])
    compute_s: float = 0.0
    data_s: float = 0.0
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    arrivals: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    startup_s: float = 0.0
    wall_s: float = 0.0

    def of_learner(self, row: int) -> dict[str, Any]:
        """Return the totals of a learner on a rank of its own, as a checkpoint holds them."""
        return {**vars(self), **{name: getattr(self, name)[row] for name in _BY_LEARNER}}

    @staticmethod
    def from_learners(saved: Sequence[Mapping[str, Any]]) -> RunTotals:
        """Return the totals of a rank from those of its learners; times are those of the first."""
        by_learner = {name: [one.get(name, absent) for one in saved] for name, absent in _BY_LEARNER.items()}
        return RunTotals(**{**saved[0], **by_learner})


_BY_LEARNER = {"samples": 0, "consensus_distance": math.nan}


def summarise(
    topology: Topology,
    averager: Averager,
    learners: Learners,
    config: Config,
    task: str,
    steps_per_epoch: int,
    result: Evaluation | None,
    own: RunTotals,
    is_complete: bool,
) -> Summary | None:
    """Return the run's summary on ranks with learners, None on servers. Collective over all ranks.

    Parameters
    ----------
    topology : Topology
        The ranks.
    averager : Averager
        Of this rank.
    learners : Learners
        Of this rank.
    config : Config
        The run's options.
    task : str
        The task's name.
    steps_per_epoch : int
        Steps of an epoch.
    result : Evaluation or None
        The last evaluation; None on servers.
    own : RunTotals
        Of this rank.
    is_complete : bool
        Whether the run took all its steps.
    """
    all_totals = topology.all_ranks.allgather(own)
    if result is None:
        return None
    of_ranks = all_totals[: topology.num_learner_ranks]
    samples = [number for one in of_ranks for number in one.samples]
    totals = averager.totals
    steps_here = sum(progress.step for progress in averager.progress_of) / len(learners)
    sums = np.array([totals.blocked_s, totals.in_flight_s, own.wall_s, steps_here])
    topology.learner_ranks.Allreduce(MPI.IN_PLACE, sums)
    blocked_s, in_flight_s, wall_s, steps = (sums / topology.num_learner_ranks).tolist()
    arrivals = sum(one.arrivals for one in all_totals)

    def mean(number: Callable[[RunTotals], float]) -> float:
        return sum(map(number, of_ranks)) / len(of_ranks)

    distance = mean(lambda one: sum(one.consensus_distance) / len(one.consensus_distance))
    engine = averager.engine
    ways = engine.delayed_crossings if averager.algorithm.delay_steps else engine.crossings
    return Summary(
        algorithm=config.method.algorithm,
        task=task,
        num_learners=topology.num_learners,
        learners_per_rank=topology.learners_per_rank,
        stacked=learners.way,
        num_servers=topology.num_servers,
        num_ranks=topology.all_ranks.Get_size(),
        num_nodes=topology.num_nodes,
        group_size=max(topology.group_sizes.values()),
        steps=round(steps),
        epochs=steps / steps_per_epoch,
        samples=sum(samples),
        samples_per_learner=samples,
        train_loss=result.train_loss,
        test_loss=result.mean.loss,
        test_accuracy=result.mean.accuracy,
        test_top5_accuracy=result.mean.top5_accuracy,
        learner_test_loss=result.learners.loss,
        learner_test_accuracy=result.learners.accuracy,
        global_averages=totals.global_averages,
        local_averages=totals.local_averages,
        exchanges=totals.exchanges,
        staleness_mean=sum(one.staleness_sum for one in all_totals) / arrivals if arrivals else None,
        staleness_max=max(one.staleness_max for one in all_totals) if arrivals else None,
        consensus_distance=None if math.isnan(distance) else distance,
        crossings=", ".join(f"{name}: {way}" for name, way in ways.items()) or None,
        bytes_averaged=totals.bytes_averaged,
        wall_s=wall_s,
        compute_s=mean(lambda one: one.compute_s),
        data_s=mean(lambda one: one.data_s),
        averaging_blocked_s=blocked_s,
        evaluation_s=mean(lambda one: one.evaluation_s),
        checkpoint_s=mean(lambda one: one.checkpoint_s),
        hidden_fraction=max(0.0, 1 - blocked_s / in_flight_s)
        if averager.algorithm.delay_steps and in_flight_s
        else None,
        startup_s=own.startup_s,
        seed=config.run.seed,
        parameters_sha256=tensor_file.digest(learners.state_of(0)),
        completed=is_complete,
    )
