"""Delayed means: started at one step, on their way beside the computation, and there some steps later."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.health import Excluded
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, PendingMean
from hpcavg.engines.pending import CompletedMean

# The complaint of a learner whose values are large; that of one that is sick is 1.
_LARGE = 0.25


@dataclass
class InFlight:
    """A mean on its way.

    Attributes
    ----------
    step : the step at which it was due.
    period_steps : the learner's steps since the mean before.
    started : when it was started.
    blocked_s : seconds that starting it took.
    num_bytes : bytes that this learner brought into it.
    num_members : number of learners that take part.
    is_sick : whether this learner brought only the report that it is sick.
    """

    step: int
    period_steps: int
    started: float
    blocked_s: float
    num_bytes: int
    num_members: int
    is_sick: bool
    pending: PendingMean | CompletedMean


class Delayed:
    """One learner's part in the delayed means of `flats`; there is one on its way at a time.

    Who is sick is told along with the mean, a number for each learner, so that nobody waits to hear of it.

    Attributes
    ----------
    flight : the mean on its way, None where there is none.
    """

    def __init__(self, flats: list[FlatBuffer], engine: Engine, topology: Topology) -> None:
        self._flats = flats
        self._engine = engine
        self._topology = topology
        self.flight: InFlight | None = None
        self._merged_step = 0
        self._given_up_step = 0  # means up to here were given up when ranks died
        device = next((array.device for flat in flats for array in flat.arrays), torch.device("cpu"))
        self._complaints = FlatBuffer([("", torch.zeros(topology.num_learners, device=device))])
        self._reallocate()
        topology.on_shrink(self._go_on)

    def start(self, progress: Progress, examine: Callable[[], tuple[bool, bool]]) -> None:
        """Start the global mean of what the buffers hold now; they may go on changing. Collective over all learners.

        examine : returns whether this learner must be left out, and whether a sum with its values may overflow. One
        that is left out is withdrawn at once, in place, since nobody asks for its parameters until the mean is merged.
        """
        topology, started = self._topology, time.perf_counter()
        sick = Excluded((), topology.num_learners, False)

        def begin() -> PendingMean | None:
            nonlocal sick
            if progress.step <= self._given_up_step:
                return None
            arrays = [array for flat in self._flats for array in flat.arrays]
            is_sick, is_large = examine()
            sick = Excluded((), topology.num_learners, is_sick)
            sick.zero_contribution(arrays)
            (complaints,) = self._complaints.arrays
            complaints.zero_()[0, topology.learners.start] = 1.0 if is_sick else _LARGE * is_large
            return self._engine.start([complaints, *arrays], GLOBAL, lambda mean: _told(mean, sick).num_well)

        pending = topology.run_retryable(begin, "start of a global mean")
        if pending is not None:
            self.flight = InFlight(
                progress.step,
                progress.step - progress.round_step,
                started,
                time.perf_counter() - started,
                sum(flat.num_bytes for flat in self._flats),
                sick.num_members,
                sick.is_here,
                pending,
            )

    def collect(self) -> tuple[InFlight, list[Tensor], Excluded, bool] | None:
        """Return the mean in flight, waiting for it where need be; None where it was given up because ranks died.

        The mean of every array is that over the learners who are well; whether it may have overflowed comes last.
        """
        means = self._topology.run_retryable(lambda: self.flight and self.flight.pending.wait(), "delayed global mean")
        flight, self.flight = self.flight, None
        if flight is None or not means:
            return None
        self._merged_step = flight.step
        complaints, *means = means
        sick = _told(complaints, Excluded((), flight.num_members, flight.is_sick))
        return flight, means, sick, int(complaints.count_nonzero()) > len(sick.learners)

    # -- after ranks died -----------------------------------------------------------------------------------------

    def _reallocate(self) -> None:
        self._complaints.move_to([self._engine.allocate(array) for array in self._complaints.arrays])

    def _go_on(self) -> None:
        """Agree with the other survivors on the mean in flight: it counts if one has it. Collective over them."""
        self._reallocate()
        flight = self.flight
        is_there = flight is not None and flight.pending.is_complete
        told = np.array(
            [
                flight.step if flight is not None and is_there else self._merged_step,
                self._given_up_step if flight is None else flight.step,
            ]
        )
        self._topology.learner_ranks.Allreduce(MPI.IN_PLACE, told, MPI.MAX)
        newest_there, newest_begun = map(int, told)
        if newest_begun > newest_there:
            self._given_up_step = newest_begun
        if flight is not None:
            means = flight.pending.settle(flight.step <= newest_there)
            flight.pending = CompletedMean(means)
            self.flight = flight if means else None

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """Return the mean in flight, which is waited for; None where there is none."""
        flight = self.flight
        if flight is None:
            return None
        with self._topology.waiting("delayed global mean", GLOBAL):
            complaints, *means = flight.pending.wait()
        flight.pending = CompletedMean([complaints, *means])
        return {
            "step": flight.step,
            "period_steps": flight.period_steps,
            "num_bytes": flight.num_bytes,
            "num_members": flight.num_members,
            "is_sick": flight.is_sick,
            "means": [mean.clone() for mean in (*means, complaints)],
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state_dict` returned."""
        self.flight = None
        if state is not None:
            known = {name: value for name, value in state.items() if name != "means"}
            (here,) = self._complaints.arrays
            *means, complaints = (mean.to(here.device, copy=True) for mean in state["means"])
            sizes = [array[0].numel() for flat in self._flats for array in flat.arrays]
            if [mean.numel() for mean in means] != sizes:
                raise ValueError("a mean in flight of another model")
            pending = CompletedMean([complaints, *means])
            self.flight = InFlight(started=time.perf_counter(), blocked_s=0.0, pending=pending, **known)


def _told(complaints: Tensor, own: Excluded) -> Excluded:
    """Return who is sick, of the learners that `own` counts, by the mean of their complaints, which goes as it is."""
    learners = (complaints > _LARGE / own.num_members).nonzero().flatten().tolist()
    return Excluded(tuple(learners), own.num_members, own.is_here)
