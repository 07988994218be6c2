"""The means of a synchronous rule: taken at once or on their way, then merged into one learner's flat buffers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcavg import health
from hpcavg.delayed import Delayed
from hpcavg.errors import CorruptionError, InputError, SickLearnersError
from hpcavg.events import Event
from hpcavg.flat import FlatBuffer
from hpcavg.gradients import GradientBuffer
from hpcavg.health import Sick
from hpcavg.mean import Engine, WireFormat, take_means
from hpcavg.merge import Merge, State, replace
from hpcavg.optimizer_state import StateAverager, forget
from hpcavg.replica import Replica
from hpcavg.rule import Rule
from hpcavg.schedule import Progress, Scope
from hpcavg.topology import Topology

_DISTANCE_CHUNK_ELEMENTS = 2**20


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
        averaged = [self._parameters, self._buffers]
        self._delayed = Delayed(averaged, engine, topology, wire_format) if rule.delay_steps else None
        self._alarm: CorruptionError | None = None
        self._made = time.perf_counter()

    # -- at once --------------------------------------------------------------------------------------------------

    def take(self, scope: Scope, progress: Progress) -> Event:
        """Take the mean that is due, of what the rule averages, and merge it. Collective over the scope.

        Raises `SickLearnersError` on all of them where they are not well.
        """
        started = time.perf_counter()
        if self._gradients is not None:
            self._refresh()
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
        topology = self._topology
        self._refresh()

        def take() -> list[Tensor]:
            arrays = [array for flat in flats for array in flat.arrays]
            is_sick = self._awaits_mean or not health.is_finite(arrays)
            sick = health.agree_on_sick(is_sick, Scope.GLOBAL, topology)
            if sick.is_everyone:
                sick = Sick((), sick.num_members, False)
            return self._means(arrays, Scope.GLOBAL, False, None, sick)

        with torch.no_grad():
            means = topology.carry_out(take)
            for array, mean in zip((array for flat in flats for array in flat.arrays), means, strict=True):
                replace.apply(array, mean, {}, 0.0)
            self._replica.put_back_constants()

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
        wants_distance = is_global and (how.reads_parameters or self._measure_distance)
        is_beside = how.reads_parameters or wants_distance

        def take() -> tuple[Sick, list[Tensor]]:
            sick = self._agree_on_sick(scope, progress.step)
            if sick.is_everyone:  # of a local group: the others will help at the next global mean
                return sick, []
            formats = None if sick.learners else wire_format
            kept = self._kept_buffers.arrays if sick.learners else []
            return sick, [
                *self._means(self._parameters.arrays, scope, is_beside, formats, sick),
                *self._means(self._buffers.arrays, scope, how_buffers.reads_parameters, formats, sick),
                *self._means(kept, scope, True, None, sick),
            ]

        distance = math.nan
        with torch.no_grad():
            self._refresh()
            sick, means = self._topology.carry_out(take, scope)
            if means:
                distance = self._merge_all(means, how, how_buffers, sick, wants_distance)
        if sick.is_everyone:
            return self._event(scope, progress, started, 0, math.nan, sick.learners)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        if is_global:
            num_bytes += self._treat_optimizer_state()
            self.learners_agree = how.agrees
        return self._event(scope, progress, started, num_bytes, distance if is_global else math.nan, sick.learners)

    def _means(
        self, arrays: Sequence[Tensor], scope: Scope, is_beside: bool, wire_format: WireFormat | None, sick: Sick
    ) -> list[Tensor]:
        """Return the means of `arrays` over those in the scope who are well, or over all where nobody is.

        Where the run goes on after a death, they are beside the arrays always: half a mean has spoilt nothing then.
        """
        sick.withdraw(arrays)
        means = take_means(self._engine, arrays, scope, is_beside or self._topology.survives, wire_format)
        for mean in means:
            sick.make_up_for(mean)
        return means

    def _merge_all(
        self, means: Sequence[Tensor], how: Merge, how_buffers: Merge, sick: Sick, wants_distance: bool
    ) -> float:
        """Merge the means of parameters, buffers and, where learners are sick, of the buffers that are else kept."""
        arrays = self._parameters.arrays
        num_arrays, num_buffers = len(arrays), len(self._buffers.arrays)
        distance = 0.0
        for array, mean, state in zip(arrays, means[:num_arrays], self._merge_states, strict=True):
            distance += self._merge(array, mean, how, state, wants_distance, sick)
        for array, mean in zip(self._buffers.arrays, means[num_arrays : num_arrays + num_buffers], strict=True):
            self._merge(array, mean, how_buffers, {}, False, sick)
        if sick.is_here:
            for array, mean in zip(self._kept_buffers.arrays, means[num_arrays + num_buffers :], strict=True):
                replace.apply(array, mean, {}, 0.0)
            forget(self._optimizer)
            self._awaits_mean = False
        self._replica.put_back_constants()
        return distance

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
        flight = None if self._delayed is None else self._delayed.flight
        return None if flight is None else flight.step + self._rule.delay_steps

    def start(self, progress: Progress) -> None:
        """Start the global mean of what the buffers hold now; they may go on changing. Collective over all learners."""
        assert self._delayed is not None

        def is_sick() -> bool:
            self._awaits_mean = self._is_sick()
            return self._awaits_mean

        with torch.no_grad():
            self._refresh()
            self._delayed.start(progress, is_sick)

    def merge(self, progress: Progress) -> Event | None:
        """Merge the mean in flight, waiting for it where need be; None where it was given up because ranks died."""
        assert self._delayed is not None
        entered, rule = time.perf_counter(), self._rule
        collected = self._delayed.collect()
        if collected is None:
            return None
        flight, means, sick = collected
        self._check_sick(sick, Scope.GLOBAL, flight.step)
        with torch.no_grad():
            self._refresh()
            for mean in means:
                sick.make_up_for(mean)
            if sick.learners:
                means += self._topology.carry_out(
                    lambda: self._means(self._kept_buffers.arrays, Scope.GLOBAL, True, None, sick)
                )
            distance = self._merge_all(means, rule.how, rule.how_buffers, sick, True)
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
            sick.learners,
        )
        self._check_equal(progress.round, progress.step, self._equal_after(rule.how, rule.how_buffers))
        return event

    # -- sick learners and silent corruption ----------------------------------------------------------------------

    def _agree_on_sick(self, scope: Scope, step: int) -> Sick:
        """Return who is left out of the mean that is due. Collective over the scope.

        Raises `SickLearnersError` on all of them where nobody may be, or nobody is left for a global mean.
        """
        is_sick = self._is_sick()
        sick = health.agree_on_sick(is_sick, scope, self._topology)
        self._check_sick(sick, scope, step)
        # Stays so until a mean is merged: what a mean makes of the parameters before is finite, but worth nothing.
        self._awaits_mean = is_sick
        return sick

    def check_health(self, step: int, what: str) -> None:
        """Raise `SickLearnersError` on all learners where they could take no global mean now. Collective over them."""

        def agree() -> Sick:
            return health.agree_on_sick(self._is_sick(), Scope.GLOBAL, self._topology)

        with torch.no_grad():
            self._refresh()
        self._check_sick(self._topology.carry_out(agree), Scope.GLOBAL, step, what)

    def _is_sick(self) -> bool:
        return self._awaits_mean or not health.is_finite([*self._parameters.arrays, *self._buffers.arrays])

    def _check_sick(self, sick: Sick, scope: Scope, step: int, what: str = "") -> None:
        """Raise `SickLearnersError` where nobody may be sick, or nobody is left for a global mean."""
        is_over = sick.is_everyone and scope is Scope.GLOBAL
        if sick.learners and (is_over or self._non_finite == "stop"):
            raise SickLearnersError(
                sick.learners, f"{what or scope.value + ' average'} of step {step}", sick.num_members
            )

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
        try:
            self._topology.carry_out(lambda: health.compare(compared, self._topology, f"at step {step}"))
        except CorruptionError as error:
            self._alarm = error

    def raise_alarm(self) -> None:
        """Raise what the last comparison has found, once all else is done that belongs to the step."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            raise alarm

    # -- helpers --------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        self._replica.refresh()

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
        return {
            "merge": [{name: tensor.clone() for name, tensor in state.items()} for state in self._merge_states],
            "in_flight": None if self._delayed is None else self._delayed.state_dict(),
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
        if self._delayed is not None:
            self._delayed.load_state_dict(state["in_flight"])


def _squared_distance(x: Tensor, mean: Tensor) -> float:
    """Return ||x_j - mean||², averaged over the rows of `x`, summed in float64."""
    parts = [
        (rows - part).abs().double().square().sum()
        for rows, part in zip(
            x.split(_DISTANCE_CHUNK_ELEMENTS, dim=1), mean.split(_DISTANCE_CHUNK_ELEMENTS), strict=True
        )
    ]
    return float(torch.stack(parts).sum()) / x.shape[0] if parts else 0.0
