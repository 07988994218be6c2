"""What a rank records during a run, and what rank 0 shows of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from mpi4py import MPI

from hpcavg.algorithms.scope import GLOBAL, SERVER, Neighbours, Scope
from hpcavg.averaging.averager import Averager
from hpcavg.averaging.events import Arrival, Event
from hpcavg.checkpoints.resume import ResumePoint
from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.results import run_folder
from hpcavg.results.columns import COLUMNS, row_of
from hpcavg.results.metrics import Recorder
from hpcavg.training.evaluation import Evaluation
from hpcavg.training.run_totals import RunTotals
from hpcavg.utils.progress import display
from hpcavg.utils.text import counted


def attributes(config: Config, task: str, topology: Topology) -> dict[str, object]:
    """Return the attributes of this rank's metrics file: the run and the rank."""
    return {
        "algorithm": config.method.algorithm,
        "task": task,
        "seed": config.run.seed,
        "num_learners": topology.num_learners,
        "rank": topology.rank,
        "role": "server" if topology.is_server else "learner",
        "group": topology.group,
        "node": MPI.Get_processor_name(),
    }


class RunRecorder:
    """Records the metrics of one rank, and shows the run on rank 0.

    Parameters
    ----------
    path : Path
        See `metrics.Recorder`.
    attributes : mapping
        See `metrics.Recorder`.
    flush_s : float
        See `metrics.Recorder`.
    rows_before : sequence of mappings
        See `metrics.Recorder`.
    topology : Topology
        The ranks.
    totals : RunTotals
        What the rank did so far; the consensus distance is kept there.
    total_steps : int
        Steps of the run.
    steps : sequence of int
        Steps that each of the rank's learners has taken.

    Attributes
    ----------
    lost : dict
        What could not be written, by kind, as far as this rank knows.
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, object],
        flush_s: float,
        rows_before: Sequence[Mapping[str, int]],
        topology: Topology,
        totals: RunTotals,
        total_steps: int,
        steps: Sequence[int],
    ) -> None:
        self._totals = totals
        self.lost: dict[str, list[str]] = {}
        self._topology = topology
        self._total_steps, self._step = total_steps, steps[0]
        self._mean_steps = steps  # at the last global mean
        self._num_losses = 0
        self._has_reported_remains = False
        learners = range(1) if topology.is_server else topology.learners
        self._metrics = Recorder(path, attributes, flush_s, rows_before, learners)
        self._shown = display(topology.rank, total_steps, steps[0])
        self.line = self._shown.line
        self.add = self._metrics.record
        self.positions = self._metrics.positions

    def announce(self, config: Config, task: str, path: Path, warnings: Sequence[str], found: ResumePoint) -> None:
        """Show the run, its folder, the warnings and the checkpoint that it goes on from."""
        topology, saved = self._topology, found.checkpoint
        servers = f", {counted(topology.num_servers, 'server')}" if topology.num_servers else ""
        if config.rule().server is not None and not topology.num_servers:
            servers = f", simulated servers (step times: {config.averaging.step_times})"
        label, learners = config.method.label, counted(topology.num_learners, "learner")
        if topology.learners_per_rank > 1:
            learners = f"{learners} ({topology.learners_per_rank} on each of {topology.num_learner_ranks} ranks)"
        self.line(
            f"{label} on {task}: {learners}, {counted(topology.num_groups, 'local group')}{servers},"
            f" {counted(topology.num_nodes, 'node')}; {counted(self._total_steps, 'step')}; {path}"
        )
        for text in (*warnings, *found.warnings):
            self.line(f"warning: {text}")
        if saved is not None:
            self.line(f"going on from step {self._step}: {saved.path}")
            if saved.manifest.num_ranks != topology.num_learners:
                self.line(
                    f"warning: it is of {counted(saved.manifest.num_ranks, 'learner')}; {topology.num_learners} start"
                    " from their mean, with the samples dealt anew and the optimizer's state empty"
                )

    def advance(self, step: int) -> None:
        """Show that `step` has been taken, and which ranks have died since."""
        self._shown.advance(step - self._step)
        self._step = step
        for loss in self._topology.losses[self._num_losses :]:
            if self._topology.rank == 0:  # the rank that has shown the run so far may have died
                self._shown = display(0, self._total_steps, step)
                self.line = self._shown.line
            self._num_losses += 1
            ranks = ", ".join(map(str, loss.ranks))
            left = counted(loss.num_learners, "learner")
            self.line(f"warning: step {step}: lost rank {ranks}; {left} went on after {loss.recovery_s:.2f} s")

    def averages(self, averager: Averager) -> float:
        """Move the averager's events into the metrics. Return the seconds for which they blocked this rank."""
        events = averager.events
        blocked_s = 0.0
        of_learners: dict[int, Sequence[object]] = {}  # exchanges with simulated servers
        while events:
            event = events.popleft()
            blocked_s += event.blocked_s
            row = dict(zip(COLUMNS["averaging"], row_of("averaging", event), strict=True))
            if event.distances:
                before = self._totals.consensus_distance
                self._totals.consensus_distance = [
                    last if math.isnan(distance) else distance
                    for distance, last in zip(event.distances, before, strict=True)
                ]
                if len(before) > 1:
                    row["consensus_distance"] = event.distances
            if event.scope is GLOBAL:
                steps = [progress.step for progress in averager.progress_of]
                if len({*steps}) > 1:  # learners at their own pace
                    row["step"] = steps
                    row["period_steps"] = [step - last for step, last in zip(steps, self._mean_steps, strict=True)]
                self._mean_steps = steps
            if event.sick:
                self._report_excluded(event)
            if event.row is None:
                self.add("averaging", *row.values())
            else:
                of_learners[event.row] = list(row.values())
        self._add_of("averaging", of_learners)
        return blocked_s

    def arrivals(self, arrivals: Iterable[Arrival], by_learner: bool) -> None:
        """Record and count updates that servers applied, as they come; `by_learner`: at most one of each learner."""
        of_learners: dict[int, Sequence[object]] = {}
        for arrival in arrivals:
            if by_learner:
                of_learners[arrival.learner] = row_of("arrival", arrival)
            else:
                self.add("arrival", *row_of("arrival", arrival))
            self._totals.arrivals += 1
            self._totals.staleness_sum += arrival.staleness
            self._totals.staleness_max = max(self._totals.staleness_max, arrival.staleness)
        self._add_of("arrival", of_learners)

    def _add_of(self, table: str, of_learners: Mapping[int, Sequence[object]]) -> None:
        """Record one row with the values of some of this rank's learners."""
        if of_learners:
            missing = [column.missing for column in COLUMNS[table].values()]
            rows = (of_learners.get(row, missing) for row in range(self._topology.learners_per_rank))
            self.add(table, *map(list, zip(*rows, strict=True)), of=sorted(of_learners))

    def _report_excluded(self, event: Event) -> None:
        """Show who was excluded. One rank of the mean does: rank 0 takes no part in means of other groups."""
        scope, topology = event.scope, self._topology
        if isinstance(scope, Neighbours):  # no two learners have the same neighbours
            is_teller = bool({*topology.learners} & {*event.sick})
        else:
            is_teller = scope is SERVER or topology.rank == topology.ranks_of(scope)[0]
        if not is_teller:
            return
        if event.num_bytes == 0:  # all of them are: no learner is left to restore them
            return
        show = self.line if self._topology.rank == 0 else partial(print, flush=True)
        show(
            f"warning: step {event.step}: parameters of learner {', '.join(map(str, event.sick))} are not"
            f" finite; it was left out of the {event.scope} average, and given it"
        )

    def evaluation(self, result: Evaluation, has_accuracy: bool, steps: Sequence[int]) -> None:
        """Record and show how the models do after an epoch; `steps` are those of each learner of this rank."""
        _, *scores = row_of("evaluation", result)
        self.add("evaluation", steps if len(steps) > 1 else steps[0], *scores)
        mean, learners, step, epoch = result.mean, result.learners, result.step, result.epoch
        line = f"epoch {epoch:3d}  step {step:6d}  train loss {result.train_loss:.4f}  test loss {mean.loss:.4f}"
        if has_accuracy:
            line += f"  accuracy {mean.accuracy:.4f}  (learners {learners.accuracy:.4f})"
        if not math.isnan(mean.top5_accuracy):
            line += f"  top-5 {mean.top5_accuracy:.4f}"
        self.line(line)

    def flush(self, scope: Scope = GLOBAL) -> None:
        """Write the rows in memory, and show what is lost on any rank of `scope`. Collective over it."""
        topology = self._topology
        self._metrics.flush()

        def tell() -> list[str | None]:  # the communicator is looked up in here: after a death it is another
            return topology.comm(scope).allgather(self._metrics.lost)

        for lost in topology.run_collective(tell, scope, "flush of records"):
            if lost is not None:
                self.report_loss("metrics", lost)

    def write(self, action: Callable[[], object]) -> None:
        """Call `action`, which writes a file. If it cannot, that is reported as a loss, and nothing is raised."""
        why = run_folder.attempt(action)
        if why is not None:
            self.report_loss(why, why)

    def report_loss(self, kind: str, lost: str) -> None:
        """Show what could not be written, and why. Only the first loss of a kind is shown; `losses` counts them."""
        of_kind = self.lost.setdefault(kind, [])
        if not of_kind:
            self.line(f"warning: not recorded: {lost}")
        if lost not in of_kind:
            of_kind.append(lost)

    def report_remains(self, remains: Sequence[str]) -> None:
        """Show, once in a run, what could not be removed. Nothing is lost by it."""
        if remains and not self._has_reported_remains:
            self._has_reported_remains = True
            self.line(f"warning: an old checkpoint cannot be removed; each new one tries again: {remains[0]}")

    def losses(self) -> str:
        """Return in one line what could not be written: the first loss of each kind, and the number of others."""
        return "; ".join(
            f"{first} (and {len(more)} more like it)" if more else first for first, *more in self.lost.values()
        )

    def close(self) -> None:
        """Close the metrics file and the progress bar. Lines can still be shown."""
        self._shown.close()
        self._metrics.close()
