"""The means of a synchronous rule: taken at once or on their way, then merged into one learner's flat buffers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.events import Event
from hpcavg.flat import FlatBuffer
from hpcavg.gradients import GradientBuffer
from hpcavg.mean import Arrived, Engine, OnItsWay, WireFormat
from hpcavg.merge import Merge, State, replace
from hpcavg.optimizer_state import StateAverager
from hpcavg.rule import Rule
from hpcavg.schedule import Progress, Scope
from hpcavg.topology import Topology

_DISTANCE_CHUNK_ELEMENTS = 2**20


@dataclass
class _InFlight:
    """A delayed mean: the step it was due at, when it was started, and the seconds that starting it took."""

    step: int
    period_steps: int
    started: float
    blocked_s: float
    num_bytes: int
    pending: OnItsWay | Arrived


class Averaging:
    """Carries out what a rule says of means on one learner's buffers and optimizer state.

    Parameters
    ----------
    rule, engine, topology, optimizer : as in `hpcavg.Averager`.
    parameters : what is averaged. buffers : what is averaged along with it, empty to leave buffers alone.
    wire_format : of what crosses nodes for the means of the rule; all other means are exact.
    state_policy : what becomes of the optimizer's state at a global mean: keep, average or reset.
    measure_distance : measure the consensus distance also where the mean would be formed in the parameters' place,
        for the price of a copy and a pass over it.

    Attributes
    ----------
    learners_agree : the last thing that happened left all learners with the same parameters.
    """

    def __init__(
        self,
        rule: Rule,
        engine: Engine,
        topology: Topology,
        optimizer: torch.optim.Optimizer,
        parameters: FlatBuffer,
        buffers: FlatBuffer,
        state_policy: str,
        measure_distance: bool,
        wire_format: WireFormat | None,
    ) -> None:
        if state_policy == "average" and rule.delay_steps:
            raise InputError("optimizer_state", state_policy, f"keep or reset: delay = {rule.delay_steps} hides a mean")
        self.learners_agree = False
        self._rule = rule
        self._engine = engine
        self._optimizer = optimizer
        self._parameters = parameters
        self._buffers = buffers
        self._state_policy = state_policy
        self._measure_distance = measure_distance
        self._wire_format = wire_format
        self._state = StateAverager(optimizer, topology)
        self._merge_states = [rule.how.init(array) for array in parameters.arrays]
        self._gradients = GradientBuffer(parameters, topology, engine) if rule.averages == "gradients" else None
        self._in_flight: _InFlight | None = None
        self._made = time.perf_counter()

    # -- at once --------------------------------------------------------------------------------------------------

    def take(self, scope: Scope, progress: Progress) -> Event:
        """Take the mean that is due, of what the rule averages, and merge it. Collective over the scope."""
        started = time.perf_counter()
        if self._gradients is not None:
            self._parameters.refresh()
            self._gradients.average(scope, self._wire_format)
            num_bytes, distance = self._gradients.num_bytes, math.nan
        else:
            is_global = scope is Scope.GLOBAL
            how, how_buffers = (self._rule.how, self._rule.how_buffers) if is_global else (replace, replace)
            num_bytes, distance = self._average(scope, how, how_buffers, self._wire_format)
        return self._event(scope, progress, started, num_bytes, distance)

    def take_final(self, progress: Progress) -> Event:
        """Take the final mean: every learner then holds it. Collective over all learners."""
        started = time.perf_counter()
        num_bytes, distance = self._average(Scope.GLOBAL, replace, replace, None)
        return self._event(Scope.GLOBAL, progress, started, num_bytes, distance)

    def replace_by_mean(self, flat: FlatBuffer) -> None:
        """Replace the tensors of `flat` by their mean over all learners."""
        with torch.no_grad():
            flat.refresh()
            for array in flat.arrays:
                self._mean_and_merge(array, Scope.GLOBAL, replace, {}, False, None)

    def _average(
        self, scope: Scope, how: Merge, how_buffers: Merge, wire_format: WireFormat | None
    ) -> tuple[int, float]:
        """Take and merge the mean over `scope`; return the bytes this learner brought in and its distance from it."""
        is_global = scope is Scope.GLOBAL
        distance = 0.0
        with torch.no_grad():
            self._refresh()
            for array, state in zip(self._parameters.arrays, self._merge_states, strict=True):
                distance += self._mean_and_merge(array, scope, how, state, is_global, wire_format)
            for array in self._buffers.arrays:
                self._mean_and_merge(array, scope, how_buffers, {}, False, wire_format)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        if is_global:
            num_bytes += self._treat_optimizer_state()
            self.learners_agree = how.agrees
        return num_bytes, distance if is_global else math.nan

    def _mean_and_merge(
        self,
        array: Tensor,
        scope: Scope,
        merge: Merge,
        state: State,
        wants_distance: bool,
        wire_format: WireFormat | None,
    ) -> float:
        """Take the mean of `array` and merge it; return this learner's distance from it, NaN where it is not at hand.

        A mean that is merged into whatever parameters is formed in their place: no copy, no second array.
        """
        is_beside = merge.reads_parameters or array.shape[0] > 1 or (wants_distance and self._measure_distance)
        mean = torch.empty_like(array[0]) if is_beside else array[0]
        self._engine.mean(array, mean, scope, wire_format)
        distance = _squared_distance(array, mean) if is_beside and wants_distance else math.nan
        merge.apply(array, mean, state, self._rate())
        return distance

    # -- on the way -----------------------------------------------------------------------------------------------

    @property
    def merge_step(self) -> int | None:
        """The step at which the mean in flight is due to be merged; None where none is."""
        return None if self._in_flight is None else self._in_flight.step + self._rule.delay_steps

    def start(self, progress: Progress) -> None:
        """Start the global mean of what the buffers hold now; they may go on changing. Collective over all learners."""
        started = time.perf_counter()
        with torch.no_grad():
            self._refresh()
            arrays = [*self._parameters.arrays, *self._buffers.arrays]
            pending = self._engine.start(arrays, Scope.GLOBAL, self._wire_format)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        period_steps = progress.step - progress.round_step
        blocked_s = time.perf_counter() - started
        self._in_flight = _InFlight(progress.step, period_steps, started, blocked_s, num_bytes, pending)

    def merge(self) -> Event:
        """Merge the mean in flight, waiting for it where need be."""
        flight, self._in_flight = self._in_flight, None
        assert flight is not None
        entered = time.perf_counter()
        means = flight.pending.wait()
        distance = 0.0
        with torch.no_grad():
            self._refresh()
            num_arrays = len(self._parameters.arrays)
            for array, mean, state in zip(self._parameters.arrays, means[:num_arrays], self._merge_states, strict=True):
                distance += _squared_distance(array, mean)
                self._rule.how.apply(array, mean, state, self._rate())
            for array, mean in zip(self._buffers.arrays, means[num_arrays:], strict=True):
                self._rule.how_buffers.apply(array, mean, {}, self._rate())
        self._treat_optimizer_state()
        self.learners_agree = self._rule.how.agrees
        return Event(
            flight.step,
            Scope.GLOBAL,
            flight.period_steps,
            flight.started - self._made,
            flight.blocked_s + time.perf_counter() - entered,
            (flight.pending.done_s or entered) - flight.started,
            flight.num_bytes,
            distance,
        )

    # -- helpers --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        self._parameters.refresh()
        self._buffers.refresh()

    def _rate(self) -> float:
        """Return the local learning rate; groups of other rates are taken to follow the first in proportion."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _treat_optimizer_state(self) -> int:
        """Do at a global mean what the policy says; return the bytes this learner brought in."""
        if self._state_policy == "average":
            return self._state.average(self._engine)
        if self._state_policy == "reset":
            self._optimizer.state.clear()
        return 0

    def _event(self, scope: Scope, progress: Progress, started: float, num_bytes: int, distance: float) -> Event:
        blocked_s = time.perf_counter() - started
        period_steps = progress.step - progress.round_step
        return Event(
            progress.step, scope, period_steps, started - self._made, blocked_s, blocked_s, num_bytes, distance
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of merges and of the mean in flight, which is waited for."""
        flight = self._in_flight
        in_flight = None
        if flight is not None:
            flight.pending = Arrived(flight.pending.wait())
            in_flight = {
                "step": flight.step,
                "period_steps": flight.period_steps,
                "num_bytes": flight.num_bytes,
                "means": [mean.clone() for mean in flight.pending.wait()],
            }
        return {
            "merge": [{name: tensor.clone() for name, tensor in state.items()} for state in self._merge_states],
            "in_flight": in_flight,
            "learners_agree": self.learners_agree,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for own, saved in zip(self._merge_states, state["merge"], strict=True):
            for name, value in saved.items():
                own[name].copy_(value)
        self.learners_agree = state["learners_agree"]
        flight, self._in_flight = state["in_flight"], None
        if flight is not None:
            pending = Arrived([mean.clone() for mean in flight["means"]])
            self._in_flight = _InFlight(
                flight["step"], flight["period_steps"], time.perf_counter(), 0.0, flight["num_bytes"], pending
            )


def _squared_distance(x: Tensor, mean: Tensor) -> float:
    """Return ||x_j - mean||², averaged over the rows of `x`, summed in float64."""
    parts = [
        (rows - part).abs().double().square().sum()
        for rows, part in zip(
            x.split(_DISTANCE_CHUNK_ELEMENTS, dim=1), mean.split(_DISTANCE_CHUNK_ELEMENTS), strict=True
        )
    ]
    return float(torch.stack(parts).sum()) / x.shape[0] if parts else 0.0
