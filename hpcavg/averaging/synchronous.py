"""The means of a synchronous rule: taken at once or on their way, then merged into one learner's flat buffers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcavg.algorithms.merge import Merge, State, replace
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL, Neighbours, Scope
from hpcavg.averaging import health
from hpcavg.averaging.calls import Call, Caller, Kind, Meeting, kind_of
from hpcavg.averaging.delayed import Delayed
from hpcavg.averaging.events import Event
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.gradients import GradientBuffer
from hpcavg.averaging.health import EqualityCheck, Excluded, check_same_start, fingerprint, squared_distance
from hpcavg.averaging.optimizer_state import StateAverager, forget
from hpcavg.averaging.outer_state import OuterState
from hpcavg.averaging.replica import Replica
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means, take_means_of_large
from hpcavg.errors import InputError


class Averaging:
    """Carries out what a rule says of means on one learner's buffers and optimizer state.

    Parameters
    ----------
    rule : the algorithm.
    engine : takes the means.
    topology : the learners.
    optimizer : the local optimizer.
    replica : whose parameters are averaged, and whose buffers.
    options : the averager's. Where they compress what crosses nodes, they do so for the means of the rule alone.
    caller : says which call a mean is.

    Attributes
    ----------
    equality : compares what learners must hold alike.
    learners_agree : the last thing that happened left all learners with the same parameters.
    """

    def __init__(
        self,
        rule: Rule,
        engine: Engine,
        topology: Topology,
        optimizer: torch.optim.Optimizer,
        replica: Replica,
        options: AveragingOptions,
        caller: Caller,
    ) -> None:
        self.learners_agree = False
        self._rule = rule
        self._engine = engine
        self._topology = topology
        self._optimizer = optimizer
        self._replica = replica
        self._parameters = parameters = replica.parameters
        self._buffers = replica.buffers if options.buffers == "average" else FlatBuffer([])
        self._kept_buffers = replica.buffers if options.buffers == "keep" else FlatBuffer([])
        self._options = options
        self._caller = caller
        self._state = StateAverager(optimizer, topology)
        self._outer = OuterState(rule.how, parameters)
        self._gradients = GradientBuffer(parameters, topology, engine) if rule.averages == "gradients" else None
        self.equality = EqualityCheck(topology, options.check_rounds, replica.frozen)
        self._awaits_mean = False  # this learner is sick, and its parameters are worth nothing until a mean is merged
        self._means_of_sick = 0  # the last so many means were of nobody: all neighbours were sick, too
        averaged = [self._parameters, self._buffers]
        self._delayed = Delayed(averaged, engine, topology) if rule.delay_steps else None
        self._made = time.perf_counter()

    # -- at once --------------------------------------------------------------------------------------------------

    def take(self, scope: Scope, progress: Progress) -> Event:
        """Take the mean that is due, of what the rule averages, and merge it. Collective over the scope.

        Raises `SickLearnersError` on all of them where they are not well.
        """
        started = time.perf_counter()
        is_global = scope is GLOBAL
        call = self._caller.call(kind_of(scope), progress)
        if self._gradients is not None:
            error = self._try_refresh()

            def meet_with(fingerprint: int) -> Meeting:
                return self._caller.meet(call, scope, error=error, fingerprint=fingerprint)

            self._gradients.average(scope, meet_with, call)
            # The steps so far took the same gradients everywhere, so they must have led to the same parameters.
            self.equality.compare(progress.round + 1, progress.step, {"parameters": self._parameters.arrays})
            return self._event(scope, progress, started, self._gradients.num_bytes, math.nan, ())
        how, how_buffers = (self._rule.how, self._rule.how_buffers) if is_global else (replace, replace)
        event = self._average(call, scope, how, how_buffers, progress, started)
        if is_global:
            self.equality.compare(progress.round + 1, progress.step, self._equal_after(how, how_buffers))
        return event

    def take_final(self, progress: Progress) -> Event:
        """Take the final mean: every learner then holds it. Collective over all learners."""
        started = time.perf_counter()
        call = self._caller.call(Kind.FINISH, progress)
        event = self._average(call, GLOBAL, replace, replace, progress, started, exact=True)
        self.equality.compare(0, progress.step, self._equal_after(replace, replace))
        return event

    def replace_by_mean(self, kind: Kind, progress: Progress, *flats: FlatBuffer) -> None:
        """Replace the tensors of `flats` by their mean over all learners, but those that are sick if others are not.

        kind : what the mean is for. Collective over all learners.
        """
        error = self._try_refresh()
        call = self._caller.call(kind, progress)

        def take() -> list[Tensor]:
            arrays = [array for flat in flats for array in flat.arrays]
            is_sick, is_large = self._examine(arrays)
            meeting = self._caller.meet(call, error=error, is_sick=is_sick, is_large=is_large)
            excluded = self._excluded(meeting, GLOBAL, is_sick)
            if excluded.is_everyone:
                excluded = Excluded((), excluded.num_members, False)
            return self._means(arrays, GLOBAL, False, excluded, meeting.is_large, exact=True)

        with torch.no_grad():
            means = self._topology.run_collective(take, what=call)
            for array, mean in zip((array for flat in flats for array in flat.arrays), means, strict=True):
                replace.apply(array, mean, {}, 0.0)
            self._replica.put_back_constants()

    def _average(
        self,
        call: Call,
        scope: Scope,
        how: Merge,
        how_buffers: Merge,
        progress: Progress,
        started: float,
        exact: bool = False,
    ) -> Event:
        """Take the mean over `scope` and merge it."""
        is_global, is_mixed = scope is GLOBAL, isinstance(scope, Neighbours)
        wants_distance = is_global and (how.reads_parameters or self._options.measure_distance)
        out_of_place = how.reads_parameters or wants_distance

        def take() -> tuple[Excluded, float, list[Tensor]]:
            is_sick, is_large = self._examine()
            told = {"is_sick": is_sick, "is_large": is_large, "rate": self._rate()}
            told["fingerprint"] = self._outer.fingerprint() if is_global else 0
            meeting = self._caller.meet(call, scope, error=error, **told)
            check_same_start(meeting.fingerprints)
            excluded = self._excluded(meeting, scope, is_sick)
            self._check_excluded(excluded, scope, call)
            # Stays true until a mean is merged: the parameters are finite after this mean, but worth nothing.
            self._awaits_mean = is_sick
            if excluded.is_everyone and not is_mixed:  # of a local group: the others will help at the next global mean
                return excluded, meeting.rate, []
            # Neighbours know of different sick learners, but must all make the same exchanges.
            kept = self._kept_buffers.arrays if excluded.learners or is_mixed else []
            is_large = meeting.is_large
            means = [
                *self._means(self._parameters.arrays, scope, out_of_place, excluded, is_large, exact),
                *self._means(self._buffers.arrays, scope, how_buffers.reads_parameters, excluded, is_large, exact),
                *self._means(kept, scope, True, excluded, is_large, exact=True),
            ]
            return excluded, meeting.rate, [] if excluded.is_everyone else means

        distance = math.nan
        with torch.no_grad():
            error = self._try_refresh()
            excluded, rate, means = self._topology.run_collective(take, scope, call)
            if is_global:
                self._outer.settle()
            if means:
                distance = self._merge_all(means, how, how_buffers, excluded, wants_distance, rate)
        self._means_of_sick = self._means_of_sick + 1 if excluded.is_everyone else 0
        if excluded.is_everyone:
            return self._event(scope, progress, started, 0, math.nan, excluded.learners)
        num_bytes = self._parameters.num_bytes + self._buffers.num_bytes
        if is_global:
            num_bytes += self._state.treat(self._options.optimizer_state, self._engine)
            self.learners_agree = how.agrees
        return self._event(scope, progress, started, num_bytes, distance if is_global else math.nan, excluded.learners)

    def _excluded(self, meeting: Meeting, scope: Scope, is_sick: bool) -> Excluded:
        """Return who is left out of the mean that this learner gets."""
        if not isinstance(scope, Neighbours):
            return Excluded(meeting.sick, meeting.num_members, is_sick)
        weights = self._topology.links(scope).weights
        return Excluded(tuple(learner for learner in meeting.sick if learner in weights), len(weights), is_sick)

    def _means(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        out_of_place: bool,
        excluded: Excluded,
        is_large: bool,
        exact: bool,
    ) -> list[Tensor]:
        """Return the means of `arrays` over those in the scope who are well, or over all if nobody is.

        If ranks may die, the means go to separate memory, so an interrupted mean leaves the parameters intact.
        """
        excluded.zero_contribution(arrays)
        out_of_place = out_of_place or self._topology.survives
        if isinstance(scope, Neighbours):  # weights sum to 1, so no sum of large values overflows
            means = take_means(self._engine, arrays, scope, out_of_place)
            return excluded.rescale(means, self._topology.links(scope).weights)
        if is_large:
            return take_means_of_large(self._engine, arrays, scope, excluded.num_members, excluded.num_well)
        return take_means(self._engine, arrays, scope, out_of_place, excluded.num_well, exact)

    def _merge_all(
        self,
        means: Sequence[Tensor],
        how: Merge,
        how_buffers: Merge,
        excluded: Excluded,
        wants_distance: bool,
        rate: float,
    ) -> float:
        """Merge the means of parameters, buffers and, where learners are sick, of the buffers that are else kept."""
        arrays = self._parameters.arrays
        num_arrays, num_buffers = len(arrays), len(self._buffers.arrays)
        distance = 0.0
        for array, mean, state in zip(arrays, means[:num_arrays], self._outer.states, strict=True):
            distance += self._merge(array, mean, how, state, wants_distance, excluded, rate)
        for array, mean in zip(self._buffers.arrays, means[num_arrays : num_arrays + num_buffers], strict=True):
            self._merge(array, mean, how_buffers, {}, False, excluded, rate)
        if excluded.is_here:
            for array, mean in zip(self._kept_buffers.arrays, means[num_arrays + num_buffers :], strict=True):
                replace.apply(array, mean, {}, 0.0)
            forget(self._optimizer)
            self._awaits_mean = False
        self._replica.put_back_constants()
        return distance

    def _merge(
        self,
        array: Tensor,
        mean: Tensor,
        merge: Merge,
        state: State,
        wants_distance: bool,
        excluded: Excluded,
        rate: float,
    ) -> float:
        """Merge `mean`; return this learner's distance from it, NaN if it is not wanted or the learner is sick."""
        distance = squared_distance(array, mean) if wants_distance and not excluded.is_here else math.nan
        if excluded.is_here and merge.reads_parameters:
            merge = replace  # its own parameters are worth nothing
        merge.apply(array, mean, state, rate)
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

        def examine() -> tuple[bool, bool]:
            self._awaits_mean, is_large = self._examine()
            return self._awaits_mean, is_large

        with torch.no_grad():
            self._replica.refresh()
            self._delayed.start(progress, examine)

    def merge(self, progress: Progress) -> Event | None:
        """Merge the mean in flight, waiting for it where need be; None where it was given up because ranks died."""
        assert self._delayed is not None
        entered, rule = time.perf_counter(), self._rule
        collected = self._delayed.collect()
        if collected is None:
            return None
        flight, means, excluded, is_large = collected
        self._check_excluded(excluded, GLOBAL, f"{GLOBAL} average of step {flight.step}")
        if is_large and not health.is_finite(means):
            raise OverflowError(f"the sum of all learners' parameters at step {flight.step} is too large for its dtype")
        self._replica.refresh()
        with torch.no_grad():
            if excluded.learners:
                means += self._topology.run_collective(
                    lambda: self._means(self._kept_buffers.arrays, GLOBAL, True, excluded, False, exact=True)
                )
            distance = self._merge_all(means, rule.how, rule.how_buffers, excluded, True, self._rate())
        self._state.treat(self._options.optimizer_state, self._engine)
        self.learners_agree = rule.how.agrees
        event = Event(
            flight.step,
            GLOBAL,
            flight.period_steps,
            flight.started - self._made,
            flight.blocked_s + time.perf_counter() - entered,
            (flight.pending.done_s or entered) - flight.started,
            flight.num_bytes,
            distance,
            excluded.learners,
        )
        self.equality.compare(progress.round, progress.step, self._equal_after(rule.how, rule.how_buffers))
        return event

    # -- sick learners and silent corruption ----------------------------------------------------------------------

    def check_health(self, progress: Progress, what: str) -> None:
        """Raise `SickLearnersError` on all learners where they could take no global mean now."""
        error = self._try_refresh()
        with torch.no_grad():
            is_sick, _ = self._examine()
        meeting = self._caller.meet_all(Kind.CHECK_HEALTH, progress, is_sick=is_sick, error=error)
        excluded = Excluded(meeting.sick, meeting.num_members, is_sick)
        self._check_excluded(excluded, GLOBAL, f"{what} of step {progress.step}")

    def _examine(self, arrays: Sequence[Tensor] | None = None) -> tuple[bool, bool]:
        """Return whether this learner is sick, and whether its values (or `arrays`) may overflow in a sum."""
        arrays = [*self._parameters.arrays, *self._buffers.arrays] if arrays is None else arrays
        is_finite, is_large = health.examine(arrays, self._topology.num_learners)
        return self._awaits_mean or not is_finite, is_large

    def _check_excluded(self, excluded: Excluded, scope: Scope, what: object) -> None:
        """Raise `SickLearnersError` if nobody may be sick, or if nobody is left to give this learner a mean.

        Neighbours that are well reach a sick learner within as many means as there are learners that it does not meet.
        """
        others = self._topology.num_learners - excluded.num_members
        is_over = scope is GLOBAL or (isinstance(scope, Neighbours) and self._means_of_sick >= others)
        is_over = excluded.is_everyone and is_over
        if excluded.learners and (is_over or self._options.non_finite == "stop"):
            health.raise_sick(excluded, scope, self._topology, str(what), self._replica.name_non_finite())

    def look_whether_agreed(self, kind: Kind, progress: Progress) -> None:
        """Find out whether all learners still hold the same, as the last mean left them. Collective over them.

        A forward pass in train mode, or weights loaded since, may have parted them again.
        """
        held = [*self._parameters.arrays, *self._buffers.arrays] if self.learners_agree else []
        self.learners_agree = len(set(self._fingerprints(kind, progress, held))) == 1 and self.learners_agree

    def _fingerprints(self, kind: Kind, progress: Progress, held: Sequence[Tensor]) -> Sequence[int]:
        """Return what tells the learners' `held` apart, of all of them. Collective."""
        error = self._try_refresh()
        return self._caller.meet_all(kind, progress, error=error, fingerprint=fingerprint(held)).fingerprints

    # -- what merges start from -----------------------------------------------------------------------------------

    def follow_start(self) -> None:
        """Let merges start from the parameters as they are now, which are compared at the next global mean."""
        if self._outer.tensors:
            self._replica.refresh()
            self._outer.start()

    def reset_anchor(self, progress: Progress) -> None:
        """Let merges start anew from the parameters as they are now, and drop a mean in flight.

        Collective over all learners. Raises `InputError` on all of them where their parameters differ.
        """
        self.meet_alike(Kind.RESET_ANCHOR, progress)
        if self._delayed is not None:
            self._delayed.collect()
        self.follow_start()

    def meet_alike(self, kind: Kind, progress: Progress) -> None:
        """Raise `InputError` on all learners where their parameters differ. Collective over them."""
        check_same_start(self._fingerprints(kind, progress, self._parameters.arrays))

    def _equal_after(self, how: Merge, how_buffers: Merge) -> dict[str, list[Tensor]]:
        """Return what all learners hold alike after merging a global mean so."""
        return {
            "parameters": self._parameters.arrays if how.agrees else [],
            "buffers": self._buffers.arrays if how_buffers.agrees else [],
            "outer state": self._outer.tensors,
        }

    # -- helpers --------------------------------------------------------------------------------------------------

    def _try_refresh(self) -> InputError | None:
        """Take back tensors that were given new memory; return what is wrong with the model, for all to be told."""
        try:
            self._replica.refresh()
        except InputError as error:
            return error
        return None

    def _rate(self) -> float:
        """Return the local learning rate; groups of other rates are taken to follow the first in proportion."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _event(
        self, scope: Scope, progress: Progress, started: float, num_bytes: int, distance: float, sick: tuple[int, ...]
    ) -> Event:
        blocked_s, since_made_s = time.perf_counter() - started, started - self._made
        period_steps = progress.step - progress.round_step
        return Event(progress.step, scope, period_steps, since_made_s, blocked_s, blocked_s, num_bytes, distance, sick)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of merges and of the mean in flight, which is waited for."""
        return {
            "merge": self._outer.state_dict(),
            "in_flight": None if self._delayed is None else self._delayed.state_dict(),
            "learners_agree": self.learners_agree,
            "awaits_mean": self._awaits_mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._outer.load_state_dict(state["merge"])
        self.learners_agree = state["learners_agree"]
        self._awaits_mean = state["awaits_mean"]
        if self._delayed is not None:
            self._delayed.load_state_dict(state["in_flight"])
