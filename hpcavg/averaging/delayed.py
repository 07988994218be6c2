"""Delayed means: they start at one step, run during the computation, and are merged some steps later (DaSGD)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging import health
from hpcavg.averaging.events import Event
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.health import Excluded
from hpcavg.averaging.learner_means import LearnerMeans, Part
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, PendingMean
from hpcavg.engines.pending import CompletedMean

# What a learner reports along with its arrays.
_SICK, _LARGE = 1.0, 0.25


class DelayedAveraging:
    """Starts the global means of a rule with a delay, and merges them when they are due.

    Parameters
    ----------
    learner : takes and merges this learner's means.
    """

    def __init__(self, learner: LearnerMeans) -> None:
        self._learner = learner
        self._delayed = Delayed([learner.parameters, learner.buffers], learner.engine, learner.topology)

    @property
    def merge_step(self) -> int | None:
        """The step at which the mean in flight is merged; None if no mean is in flight."""
        flight = self._delayed.flight
        return None if flight is None else flight.step + self._learner.rule.delay_steps

    def start(self, progress: Progress) -> None:
        """Start the global mean of the current values, which may then change. Collective over all learners."""
        learner = self._learner

        def examine() -> tuple[Sequence[int], bool]:
            learner.awaiting, is_large = learner.examine()
            return learner.awaiting, is_large

        with torch.no_grad():
            learner.replica.refresh()
            self._delayed.start(progress, examine)

    def merge(self, progress: Progress) -> Event | None:
        """Wait for the mean in flight and merge it. Collective over all learners.

        Returns
        -------
        Event or None
            None if the mean was abandoned because ranks died.

        Raises
        ------
        SickLearnersError
            On all learners, if sick learners stop the run.
        OverflowError
            On all learners, if the sum of large values is not finite.
        """
        entered, learner = time.perf_counter(), self._learner
        rule = learner.rule
        collected = self._delayed.collect()
        if collected is None:
            return None
        flight, means, excluded, is_large = collected
        part = Part(excluded, learner.topology.learners_per_rank)
        learner.check_excluded(part, GLOBAL, f"{GLOBAL} average of step {flight.step}")
        if is_large and not health.is_finite(means):
            raise OverflowError(f"the sum of all learners' parameters at step {flight.step} is too large for its dtype")
        learner.replica.refresh()
        with torch.no_grad():
            if excluded.learners:
                means += learner.topology.run_collective(
                    lambda: learner.take(learner.kept_buffers.arrays, GLOBAL, True, excluded, False, exact=True)
                )
            distances = learner.merge(part, means, rule.how, rule.how_buffers, learner.held(False), learner.rate)
            learner.replica.put_back_constants()
        learner.end_global(rule.how)
        event = Event(
            flight.step,
            GLOBAL,
            flight.period_steps,
            flight.started - learner.made,
            flight.blocked_s + time.perf_counter() - entered,
            (flight.pending.done_s or entered) - flight.started,
            flight.num_bytes,
            excluded.learners,
            distances,
        )
        equal = partial(learner.equal_after, rule.how, rule.how_buffers)
        learner.equality.compare(progress.round, progress.step, equal)
        return event

    def drop(self) -> None:
        """Wait for the mean in flight, and do not merge it."""
        self._delayed.collect()

    def state_dict_of(self, row: int) -> dict[str, Any] | None:
        """Return the mean in flight for one learner, after waiting for it; None if no mean is in flight."""
        return self._delayed.state_dict_of(row)

    def load_state_dicts(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Continue from what `state_dict_of` returned for each learner of the rank."""
        self._delayed.load_state_dicts(states)


@dataclass
class InFlight:
    """A mean in flight.

    Attributes
    ----------
    step : the step at which it was due.
    period_steps : a learner's steps since the mean before.
    started : when it was started, on the clock of `time.perf_counter`.
    blocked_s : how long its start blocked this rank.
    num_bytes : bytes that a learner brought into it.
    num_members : number of learners that take part.
    sick_rows : the rows of the learners of this rank that were sick, and contributed zeros.
    pending : the mean itself.
    """

    step: int
    period_steps: int
    started: float
    blocked_s: float
    num_bytes: int
    num_members: int
    sick_rows: Sequence[int]
    pending: PendingMean | CompletedMean


class Delayed:
    """Keeps one global mean in flight.

    The first array of the mean holds one report per learner: sick, large values, or neither. The reports need no
    exchange of their own, so no learner waits for them.

    Parameters
    ----------
    flats : hold the tensors that are averaged.
    engine : takes the means.
    topology : the learners.

    Attributes
    ----------
    flight : the mean in flight; None if there is none.
    """

    def __init__(self, flats: list[FlatBuffer], engine: Engine, topology: Topology) -> None:
        self._flats = flats
        self._engine = engine
        self._topology = topology
        self.flight: InFlight | None = None
        self._merged_step = 0
        self._abandoned_step = 0  # means of steps up to this one were abandoned when ranks died
        device = next((array.device for flat in flats for array in flat.arrays), torch.device("cpu"))
        reports = torch.zeros(topology.learners_per_rank, topology.num_learners, device=device)
        self._reports = FlatBuffer([("", reports)], topology.learners_per_rank)
        self._reallocate()
        topology.on_shrink(self._agree_after_shrink)

    def start(self, progress: Progress, examine: Callable[[], tuple[Sequence[int], bool]]) -> None:
        """Start the mean of the current values, which may then change. Collective over all learners.

        Parameters
        ----------
        progress : the learners' progress.
        examine : returns the rows of the sick learners, and whether the sum of all learners' values may overflow. The
            values of a sick learner become zero at once: nobody reads its parameters before the mean is merged.
        """
        topology, started = self._topology, time.perf_counter()
        excluded = Excluded((), topology.num_learners, ())

        def begin() -> PendingMean | None:
            nonlocal excluded
            if progress.step <= self._abandoned_step:
                return None
            arrays = [array for flat in self._flats for array in flat.arrays]
            sick_rows, is_large = examine()
            excluded = Excluded((), topology.num_learners, sick_rows)
            excluded.zero_contribution(arrays)
            (reports,) = self._reports.arrays
            reports.zero_()
            for row, learner in enumerate(topology.learners):
                reports[row, learner] = _SICK if row in sick_rows else _LARGE * is_large
            return self._engine.start([reports, *arrays], GLOBAL, lambda mean: _reported(mean, excluded).num_well)

        pending = topology.run_retryable(begin, "start of a global mean")
        if pending is not None:
            self.flight = InFlight(
                progress.step,
                progress.step - progress.round_step,
                started,
                time.perf_counter() - started,
                sum(flat.num_bytes for flat in self._flats),
                excluded.num_members,
                excluded.rows,
                pending,
            )

    def collect(self) -> tuple[InFlight, list[Tensor], Excluded, bool] | None:
        """Wait for the mean in flight and end its flight.

        Returns
        -------
        tuple or None
            The flight, the mean of every array over the learners that are not sick, the sick learners, and whether a
            sum may have overflowed. None if the mean was abandoned because ranks died.
        """
        means = self._topology.run_retryable(lambda: self.flight and self.flight.pending.wait(), "delayed global mean")
        flight, self.flight = self.flight, None
        if flight is None or not means:
            return None
        self._merged_step = flight.step
        reports, *means = means
        excluded = _reported(reports, Excluded((), flight.num_members, flight.sick_rows))
        return flight, means, excluded, int(reports.count_nonzero()) > len(excluded.learners)

    # -- after ranks died -----------------------------------------------------------------------------------------

    def _reallocate(self) -> None:
        self._reports.move_to([self._engine.allocate(array) for array in self._reports.arrays])

    def _agree_after_shrink(self) -> None:
        """Keep the mean in flight if one survivor has it; else abandon it everywhere. Collective over the survivors."""
        self._reallocate()
        flight = self.flight
        is_complete = flight is not None and flight.pending.is_complete
        steps = np.array(
            [
                flight.step if flight is not None and is_complete else self._merged_step,
                self._abandoned_step if flight is None else flight.step,
            ]
        )
        self._topology.learner_ranks.Allreduce(MPI.IN_PLACE, steps, MPI.MAX)
        newest_complete, newest_started = map(int, steps)
        if newest_started > newest_complete:
            self._abandoned_step = newest_started
        if flight is not None:
            means = flight.pending.settle(flight.step <= newest_complete)
            flight.pending = CompletedMean(means)
            self.flight = flight if means else None

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict_of(self, row: int) -> dict[str, Any] | None:
        """Return the mean in flight for one learner, after waiting for it; None if no mean is in flight."""
        flight = self.flight
        if flight is None:
            return None
        with self._topology.waiting("delayed global mean", GLOBAL):
            reports, *means = flight.pending.wait()
        flight.pending = CompletedMean([reports, *means])
        return {
            "step": flight.step,
            "period_steps": flight.period_steps,
            "num_bytes": flight.num_bytes,
            "num_members": flight.num_members,
            "is_sick": row in flight.sick_rows,
            "means": [mean.clone() for mean in (*means, reports)],
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any] | None]) -> None:
        """Continue from what `state_dict_of` returned for each learner of the rank.

        Raises
        ------
        ValueError
            If the mean is of another model.
        """
        self.flight = None
        state = states[0]
        if state is not None:
            known = {name: value for name, value in state.items() if name not in ("means", "is_sick")}
            sick_rows = tuple(row for row, each in enumerate(states) if each is not None and each["is_sick"])
            (here,) = self._reports.arrays
            *means, reports = (mean.to(here.device, copy=True) for mean in state["means"])
            sizes = [array[0].numel() for flat in self._flats for array in flat.arrays]
            if [mean.numel() for mean in means] != sizes:
                raise ValueError("a mean in flight of another model")
            pending = CompletedMean([reports, *means])
            started = time.perf_counter()
            self.flight = InFlight(started=started, blocked_s=0.0, sick_rows=sick_rows, pending=pending, **known)


def _reported(reports: Tensor, own: Excluded) -> Excluded:
    """Return `own` with the learners that reported that they are sick.

    Parameters
    ----------
    reports : the mean of all learners' reports, shape (learners,).
    own : the number of learners, and the sick ones of this rank.
    """
    learners = (reports > _LARGE / own.num_members).nonzero().flatten().tolist()
    return Excluded(tuple(learners), own.num_members, own.rows)
