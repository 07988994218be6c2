"""The means of a synchronous rule: taken at once or on their way, then merged into one learner's flat buffers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcavg import health
from hpcavg.errors import InputError, SickLearnersError
from hpcavg.events import Event
from hpcavg.flat import FlatBuffer
from hpcavg.gradients import GradientBuffer
from hpcavg.health import Sick
from hpcavg.mean import Arrived, Engine, OnItsWay, WireFormat
from hpcavg.merge import Merge, State, replace
from hpcavg.optimizer_state import StateAverager, forget
from hpcavg.replica import Replica
from hpcavg.rule import Rule
from hpcavg.schedule import Progress, Scope
from hpcavg.topology import Topology

_DISTANCE_CHUNK_ELEMENTS = 2**20


@dataclass
class _InFlight:
    """A delayed mean: the step it was due at, when it was started, the seconds that took, and whom it leaves out."""

    step: int
    period_steps: int
    started: float
    blocked_s: float
    num_bytes: int
    sick: Sick
    pending: OnItsWay | Arrived


class Averaging:
    """Carries out what a rule says of means on one learner's buffers and optimizer state.

    Parameters
    ----------
    rule, engine, topology, optimizer : as in `hpcavg.Averager`.
    replica : whose parameters are averaged. buffer_policy : its buffers are averaged along with them if "average".
    wire_format : of what crosses nodes for the means of the rule; all other means are exact.
    state_policy : what becomes of the optimizer's state at a global mean: keep, average or reset.
    measure_distance : measure the consensus distance also where the mean would be formed in the parameters' place,
        for the price of a copy and a pass over it.
    non_finite, check_rounds : as in `hpcavg.Averager`.

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
        replica: Replica,
        buffer_policy: str,
        state_policy: str,
        measure_distance: bool,
        wire_format: WireFormat | None,
        non_finite: str,
        check_rounds: int,
    ) -> None:
        if state_policy == "average" and rule.delay_steps:
            raise InputError("optimizer_state", state_policy, f"keep or reset: delay = {rule.delay_steps} hides a mean")
        self.learners_agree = False
        self._rule = rule
        self._engine = engine
        self._topology = topology
        self._optimizer = optimizer
        self._replica = replica
        self._parameters = parameters = replica.parameters
        self._buffers = replica.buffers if buffer_policy == "average" else FlatBuffer([])
        self._kept_buffers = replica.buffers if buffer_policy == "keep" else FlatBuffer([])
        self._state_policy = state_policy
        self._measure_distance = measure_distance
        self._wire_format = wire_format
        self._state = StateAverager(optimizer, topology)
        self._merge_states = [rule.how.init(array) for array in parameters.arrays]
        self._gradients = GradientBuffer(parameters, topology, engine) if rule.averages == "gradients" else None
        self._non_finite = non_finite
        self._check_rounds = check_rounds
        self._awaits_mean = False  # this learner is sick, and its parameters are worth nothing until a mean is merged
        self._in_flight: _InFlight | None = None
        self._made = time.perf_counter()

    # -- at once --------------------------------------------------------------------------------------------------

    def take(self, scope: Scope, progress: Progress) -> Event:
        """Take the mean that is due, of what the rule averages, and merge it. Collective over the scope.

        Raises `SickLearnersError` or `CorruptionError` on all of them where they are not well.
        """
        started = time.perf_counter()
        if self._gradients is not None:
            self._parameters.refresh()
            # The steps so far took the same gradients everywhere, so they must have led to the same parameters.
            self._check_equal(progress.round + 1, progress.step, ["parameters"])
            self._gradients.average(scope, self._wire_format)
            return self._event(scope, progress, started, self._gradients.num_bytes, math.nan, ())
        is_global = scope is Scope.GLOBAL
        how, how_buffers = (self._rule.how, self._rule.how_buffers) if is_global else (replace, replace)
        event = self._average(scope, how, how_buffers, self._wire_format, progress, started)
        if is_global:
            self._check_equal(progress.round + 1, progress.step, self._equal_after(how, how_buffers))
        return event

    def take_final(self, progress: Progress) -> Event:
        """Take the final mean: every learner then holds it. Collective over all learners."""
        started = time.perf_counter()
        event = self._average(Scope.GLOBAL, replace, replace, None, progress, started)
        self._check_equal(0, progress.step, self._equal_after(replace, replace))
        return event

    def replace_by_mean(self, *flats: FlatBuffer) -> None:
        """Replace the tensors of `flats` by their mean over all learners, but those that are sick if others are not."""
        with torch.no_grad():
            for flat in flats:
                flat.refresh()
            arrays = [array for flat in flats for array in flat.arrays]
            sick = health.agree_on_sick(self._awaits_mean or not health.is_finite(arrays), Scope.GLOBAL, self._topology)
            if sick.is_everyone:
                sick = Sick((), sick.num_members, False)
            for array in arrays:
                self._mean_and_merge(array, Scope.GLOBAL, replace, {}, False, None, sick)

    def _average(
        self,
        scope: Scope,
        how: Merge,
        how_buffers: Merge,
        wire_format: WireFormat | None,
        progress: Progress,
        started: float,
    ) -> Event:
        """Take the mean over `scope` and merge it."""
        is_global = scope is Scope.GLOBAL
        distance = 0.0
        with torch.no_grad():
            self._refresh()
            sick = self._agree_on_sick(scope, progress.step)
            if sick.is_everyone:  # of a local group: the others will help at the next global mean
                return self._event(scope, progress, started, 0, math.nan, sick.learners)
            for array, state in zip(self._parameters.arrays, self._merge_states, strict=True):
                distance += self._mean_and_merge(array, scope, how, state, is_global, wire_format, sick)
            for array in self._buffers.arrays:
                self._mean_and_merge(array, scope, how_buffers, {}, False, wire_format, sick)
            self._recover(scope, sick)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        if is_global:
            num_bytes += self._treat_optimizer_state()
            self.learners_agree = how.agrees
        return self._event(scope, progress, started, num_bytes, distance if is_global else math.nan, sick.learners)

    def _mean_and_merge(
        self,
        array: Tensor,
        scope: Scope,
        merge: Merge,
        state: State,
        wants_distance: bool,
        wire_format: WireFormat | None,
        sick: Sick,
    ) -> float:
        """Take the mean of `array` and merge it; return this learner's distance from it, NaN where it is not at hand.

        A mean that is merged into whatever parameters is formed in their place: no copy, no second array.
        """
        is_beside = merge.reads_parameters or array.shape[0] > 1 or (wants_distance and self._measure_distance)
        mean = torch.empty_like(array[0]) if is_beside else array[0]
        sick.withdraw([array])
        self._engine.mean(array, mean, scope, None if sick.learners else wire_format)
        sick.make_up_for(mean)
        return self._merge(array, mean, merge, state, is_beside and wants_distance, sick)

    def _merge(
        self, array: Tensor, mean: Tensor, merge: Merge, state: State, wants_distance: bool, sick: Sick
    ) -> float:
        """Merge `mean`; return this learner's distance from it, NaN if it is not wanted or the learner is sick."""
        distance = _squared_distance(array, mean) if wants_distance and not sick.is_here else math.nan
        if sick.is_here and merge.reads_parameters:
            merge = replace  # its own parameters are worth nothing
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
            sick = self._agree_on_sick(Scope.GLOBAL, progress.step)
            arrays = [*self._parameters.arrays, *self._buffers.arrays]
            sick.withdraw(arrays)  # in place: until the mean is merged, nobody asks for them
            pending = self._engine.start(arrays, Scope.GLOBAL, None if sick.learners else self._wire_format)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        period_steps = progress.step - progress.round_step
        blocked_s = time.perf_counter() - started
        self._in_flight = _InFlight(progress.step, period_steps, started, blocked_s, num_bytes, sick, pending)

    def merge(self, progress: Progress) -> Event:
        """Merge the mean in flight, waiting for it where need be. Collective where learners were sick or are checked.

        Raises `CorruptionError` on all learners where they must agree afterwards and do not.
        """
        flight, self._in_flight = self._in_flight, None
        assert flight is not None
        entered = time.perf_counter()
        means = flight.pending.wait()
        rule, distance = self._rule, 0.0
        with torch.no_grad():
            self._refresh()
            for mean in means:
                flight.sick.make_up_for(mean)
            num_arrays = len(self._parameters.arrays)
            for array, mean, state in zip(self._parameters.arrays, means[:num_arrays], self._merge_states, strict=True):
                distance += self._merge(array, mean, rule.how, state, True, flight.sick)
            for array, mean in zip(self._buffers.arrays, means[num_arrays:], strict=True):
                self._merge(array, mean, rule.how_buffers, {}, False, flight.sick)
            self._recover(Scope.GLOBAL, flight.sick)
        self._treat_optimizer_state()
        self.learners_agree = rule.how.agrees
        event = Event(
            flight.step,
            Scope.GLOBAL,
            flight.period_steps,
            flight.started - self._made,
            flight.blocked_s + time.perf_counter() - entered,
            (flight.pending.done_s or entered) - flight.started,
            flight.num_bytes,
            distance,
            flight.sick.learners,
        )
        self._check_equal(progress.round, progress.step, self._equal_after(rule.how, rule.how_buffers))
        return event

    # -- sick learners and silent corruption ----------------------------------------------------------------------

    def _agree_on_sick(self, scope: Scope, step: int) -> Sick:
        """Return who is left out of the mean that is due. Collective over the scope.

        Raises `SickLearnersError` on all of them where nobody may be, or nobody is left for a global mean.
        """
        arrays = [*self._parameters.arrays, *self._buffers.arrays]
        is_sick = self._awaits_mean or not health.is_finite(arrays)
        sick = health.agree_on_sick(is_sick, scope, self._topology)
        is_over = sick.is_everyone and scope is Scope.GLOBAL
        if sick.learners and (is_over or self._non_finite == "stop"):
            raise SickLearnersError(sick.learners, scope.value, step, sick.num_members)
        # Stays so until a mean is merged: what a mean makes of the parameters before is finite, but worth nothing.
        self._awaits_mean = is_sick
        return sick

    def _recover(self, scope: Scope, sick: Sick) -> None:
        """Do with the sick what is left to be done once they have the mean. Collective over the scope if any are."""
        if not sick.learners:
            return
        self._kept_buffers.refresh()
        for array in self._kept_buffers.arrays:
            mean = torch.empty_like(array[0])
            sick.withdraw([array])
            self._engine.mean(array, mean, scope)
            sick.make_up_for(mean)
            if sick.is_here:
                array.copy_(mean)
        if sick.is_here:
            forget(self._optimizer)
            self._awaits_mean = False

    def _equal_after(self, how: Merge, how_buffers: Merge) -> list[str]:
        """Return the names of what all learners hold alike after merging a global mean so."""
        return ["parameters"] * how.agrees + ["buffers"] * how_buffers.agrees + ["outer state"]

    def _check_equal(self, number: int, step: int, names: Sequence[str]) -> None:
        """Compare what `names` says if mean `number` is one to check after. Collective over all learners."""
        if not self._check_rounds or number % self._check_rounds:
            return
        parts: dict[str, list[Tensor]] = {
            "parameters": self._parameters.arrays,
            "buffers": self._buffers.arrays,
            "outer state": [tensor for state in self._merge_states for tensor in state.values()],
        }
        compared = {name: parts[name] for name in names if parts[name]}
        if self._replica.frozen:
            compared["frozen parameters"] = self._replica.frozen
        health.compare(compared, self._topology, f"at step {step}")

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

    def _event(
        self,
        scope: Scope,
        progress: Progress,
        started: float,
        num_bytes: int,
        distance: float,
        sick: tuple[int, ...],
    ) -> Event:
        blocked_s = time.perf_counter() - started
        period_steps = progress.step - progress.round_step
        return Event(
            progress.step, scope, period_steps, started - self._made, blocked_s, blocked_s, num_bytes, distance, sick
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
                "sick": list(flight.sick.learners),
            }
        return {
            "merge": [{name: tensor.clone() for name, tensor in state.items()} for state in self._merge_states],
            "in_flight": in_flight,
            "learners_agree": self.learners_agree,
            "awaits_mean": self._awaits_mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for own, saved in zip(self._merge_states, state["merge"], strict=True):
            for name, value in saved.items():
                own[name].copy_(value)
        self.learners_agree = state["learners_agree"]
        self._awaits_mean = state["awaits_mean"]
        flight, self._in_flight = state["in_flight"], None
        if flight is not None:
            pending = Arrived([mean.clone() for mean in flight["means"]])
            learners = tuple(flight["sick"])
            sick = Sick(learners, self._topology.num_learners, self._topology.rank in learners)
            self._in_flight = _InFlight(
                flight["step"], flight["period_steps"], time.perf_counter(), 0.0, flight["num_bytes"], sick, pending
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
