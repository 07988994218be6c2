"""Totals of a rank over a run, and the run's summary made from those of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import tensor_file
from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.results.summary import Summary
from hpcavg.training.evaluation import Evaluation


@dataclass
class RunTotals:
    """What this rank did, apart from its averages. A resumed run continues with it.

    Attributes
    ----------
    samples : int
        Training samples.
    compute_s : float
        Seconds in passes and optimizer steps.
    data_s : float
        Seconds waiting for mini-batches.
    evaluation_s : float
        Seconds in evaluations.
    checkpoint_s : float
        Seconds in checkpoints.
    consensus_distance : float
        The last one measured; NaN if none was.
    arrivals : int
        Updates that this server applied.
    staleness_sum : int
        Sum of their staleness.
    staleness_max : int
        The largest staleness.
    startup_s : float
        Seconds from the start of the process to the training, over all segments.
    wall_s : float
        Seconds of training, of earlier segments.
    """

    samples: int = 0
    compute_s: float = 0.0
    data_s: float = 0.0
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    consensus_distance: float = math.nan
    arrivals: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    startup_s: float = 0.0
    wall_s: float = 0.0


def summarise(
    topology: Topology,
    averager: Averager,
    config: Config,
    task: str,
    steps_per_epoch: int,
    result: Evaluation | None,
    own: RunTotals,
    is_complete: bool,
) -> Summary | None:
    """Return the run's summary on learners, None on servers. Collective over all ranks.

    Parameters
    ----------
    topology : Topology
        The ranks.
    averager : Averager
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
    learners, servers = all_totals[: topology.num_learner_ranks], all_totals[topology.num_learner_ranks :]
    totals = averager.totals
    sums = np.array([totals.blocked_s, totals.in_flight_s, own.wall_s, averager.progress.step])
    topology.learner_ranks.Allreduce(MPI.IN_PLACE, sums)
    blocked_s, in_flight_s, wall_s, steps = (sums / topology.num_learner_ranks).tolist()
    arrivals = sum(server.arrivals for server in servers)

    def mean(number: Callable[[RunTotals], float]) -> float:
        return sum(map(number, learners)) / len(learners)

    distance = mean(lambda one: one.consensus_distance)
    return Summary(
        algorithm=config.method.algorithm,
        task=task,
        num_learners=topology.num_learners,
        num_servers=topology.num_servers,
        num_ranks=topology.all_ranks.Get_size(),
        num_nodes=topology.num_nodes,
        group_size=max(topology.group_sizes.values()),
        steps=round(steps),
        epochs=steps / steps_per_epoch,
        samples=sum(one.samples for one in learners),
        samples_per_learner=[one.samples for one in learners],
        train_loss=result.train_loss,
        test_loss=result.mean.loss,
        test_accuracy=result.mean.accuracy,
        test_top5_accuracy=result.mean.top5_accuracy,
        learner_test_loss=result.learners.loss,
        learner_test_accuracy=result.learners.accuracy,
        global_averages=totals.global_averages,
        local_averages=totals.local_averages,
        exchanges=totals.exchanges,
        staleness_mean=sum(server.staleness_sum for server in servers) / arrivals if arrivals else None,
        staleness_max=max(server.staleness_max for server in servers) if arrivals else None,
        consensus_distance=None if math.isnan(distance) else distance,
        crossings=", ".join(f"{name}: {way}" for name, way in averager.engine.crossings.items()) or None,
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
        parameters_sha256=tensor_file.digest(averager.model.state_dict()),
        completed=is_complete,
    )
