"""What a rank records and shows of a run while it goes on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from mpi4py import MPI

from hpcavg.algorithms.scope import GLOBAL, LOCAL, SERVER, Neighbours, Scope
from hpcavg.averaging.events import Event
from hpcavg.checkpoints.resume import Found
from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.results import run_folder
from hpcavg.results.metrics import Recorder
from hpcavg.results.summary import counted
from hpcavg.training.run_totals import Account, Result
from hpcavg.utils.progress import display


def attributes(config: Config, task: str, topology: Topology) -> dict[str, object]:
    """Return what the run is and which rank this is, to be kept with its metrics."""
    return {
        "algorithm": config.algorithm,
        "task": task,
        "seed": config.seed,
        "num_learners": topology.num_learners,
        "rank": topology.rank,
        "role": "server" if topology.is_server else "learner",
        "group": topology.group,
        "node": MPI.Get_processor_name(),
    }


class Record:
    """The metrics of one rank, its account, and what is shown of the run by rank 0.

    path, attributes, flush_s, rows_before : as in `metrics.Recorder`. total_steps, step : of the run, and those that
    have been taken.

    Attributes
    ----------
    account : what the rank did so far. lost : what could not be written, by kind, as far as this rank knows.
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, object],
        flush_s: float,
        rows_before: Mapping[str, int],
        topology: Topology,
        account: Account,
        total_steps: int,
        step: int,
    ) -> None:
        self.account = account
        self.lost: dict[str, list[str]] = {}
        self._topology = topology
        self._total_steps, self._step = total_steps, step
        self._num_losses = 0
        self._has_told_of_remains = False
        self._metrics = Recorder(path, attributes, flush_s, rows_before)
        self._shown = display(topology.rank, total_steps, step)
        self.line = self._shown.line
        self.add = self._metrics.record
        self.positions = self._metrics.positions

    def announce(self, config: Config, task: str, path: Path, warnings: Sequence[str], found: Found) -> None:
        """Show what the run is, where it goes, and what it goes on from."""
        topology, saved = self._topology, found.checkpoint
        servers = f", {counted(topology.num_servers, 'server')}" if topology.num_servers else ""
        label, learners = config.algorithm.replace("_", "-"), counted(topology.num_learners, "learner")
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
        """Show that `step` has been taken, and which ranks have died meanwhile."""
        self._shown.advance()
        for loss in self._topology.losses[self._num_losses :]:
            if self._topology.rank == 0:  # whoever has shown the run so far may be among them
                self._shown = display(0, self._total_steps, step)
                self.line = self._shown.line
            self._num_losses += 1
            ranks = ", ".join(map(str, loss.ranks))
            left = counted(loss.num_learners, "learner")
            self.line(f"warning: step {step}: lost rank {ranks}; {left} went on after {loss.recovery_s:.2f} s")

    def averages(self, events: deque[Event]) -> float:
        """Move `events` into the metrics; return the seconds they blocked this learner."""
        blocked_s = 0.0
        while events:
            event = events.popleft()
            blocked_s += event.blocked_s
            if not math.isnan(event.consensus_distance):
                self.account.consensus_distance = event.consensus_distance
            if event.sick:
                self._tell_of_sick(event)
            self.add(
                "averaging",
                event.step,
                event.scope.name,
                event.period_steps,
                event.started_s,
                event.blocked_s,
                event.in_flight_s,
                event.num_bytes,
                event.consensus_distance,
            )
        return blocked_s

    def _tell_of_sick(self, event: Event) -> None:
        """Show who was left out, through one rank of those that know: rank 0 has no part in means of other groups."""
        scope, topology = event.scope, self._topology
        if isinstance(scope, Neighbours):  # no two learners have the same neighbours
            is_teller = topology.learners.start in event.sick
        else:
            is_teller = scope is SERVER or topology.rank == topology.ranks_of(scope)[0]
        if not is_teller:
            return
        if scope is LOCAL and len(event.sick) == len(topology.ranks_of(scope)):
            return  # nobody could help them; the global average will, and tell
        show = self.line if self._topology.rank == 0 else partial(print, flush=True)
        show(
            f"warning: step {event.step}: parameters of learner {', '.join(map(str, event.sick))} are not"
            f" finite; it was left out of the {event.scope} average, and given it"
        )

    def evaluation(self, step: int, epoch: int, result: Result, has_accuracy: bool) -> None:
        """Record and show how the models do after `epoch`."""
        mean, learners = result.mean, result.learners
        scores = (mean.loss, mean.accuracy, mean.top5_accuracy, learners.loss, learners.accuracy)
        self.add("evaluation", step, epoch, result.train_loss, *scores)
        line = f"epoch {epoch:3d}  step {step:6d}  train loss {result.train_loss:.4f}  test loss {mean.loss:.4f}"
        if has_accuracy:
            line += f"  accuracy {mean.accuracy:.4f}  (learners {learners.accuracy:.4f})"
        if not math.isnan(mean.top5_accuracy):
            line += f"  top-5 {mean.top5_accuracy:.4f}"
        self.line(line)

    def flush(self, scope: Scope = GLOBAL) -> None:
        """Write what has been recorded, and show what is lost on any rank of `scope`. Collective over it."""
        topology = self._topology
        self._metrics.flush()

        def tell() -> list[str | None]:  # the communicator is looked up inside: after a death it is another
            return topology.comm(scope).allgather(self._metrics.lost)

        for lost in topology.run_collective(tell, scope, "flush of records"):
            if lost is not None:
                self.tell_of("metrics", lost)

    def write(self, action: Callable[[], object]) -> None:
        """Call `action`, which writes a file; where it cannot, that is a loss and no failure."""
        why = run_folder.attempt(action)
        if why is not None:
            self.tell_of(why, why)

    def tell_of(self, kind: str, lost: str) -> None:
        """Show what could not be written, and why: the first loss of its kind; `losses` counts the others."""
        of_kind = self.lost.setdefault(kind, [])
        if not of_kind:
            self.line(f"warning: not recorded: {lost}")
        if lost not in of_kind:
            of_kind.append(lost)

    def tell_of_remains(self, remains: Sequence[str]) -> None:
        """Show, once in a run, what could not be removed: it is in the way of nothing, and nothing is lost."""
        if remains and not self._has_told_of_remains:
            self._has_told_of_remains = True
            self.line(f"warning: an old checkpoint cannot be removed; each new one tries again: {remains[0]}")

    def losses(self) -> str:
        """Return in one line what could not be written: the first loss of each kind, and how many followed it."""
        return "; ".join(
            f"{first} (and {len(more)} more like it)" if more else first for first, *more in self.lost.values()
        )

    def close(self) -> None:
        """Close the metrics file and leave the terminal as it was; lines can still be shown."""
        self._shown.close()
        self._metrics.close()
