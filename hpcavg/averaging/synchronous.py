"""Means that the learners wait for, and what learners tell each other outside of means."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hpcavg.algorithms.merge import Merge, replace
from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL, Neighbours, Scope
from hpcavg.averaging.calls import Call, Caller, Kind, Meeting, Told, kind_of
from hpcavg.averaging.events import Event
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.gradients import GradientBuffer
from hpcavg.averaging.health import Excluded, check_same_start, fingerprint
from hpcavg.averaging.learner_means import LearnerMeans
from hpcavg.engines.reduction import Array, Values
from hpcavg.errors import InputError


class Averaging:
    """Takes the means that a rule asks for, one after the other.

    Parameters
    ----------
    learner : takes and merges this learner's means.
    caller : identifies every call.

    Attributes
    ----------
    told : what the learners told for the schedule at the last mean, as `Meeting.told`; None if they told nothing.
    """

    def __init__(self, learner: LearnerMeans, caller: Caller) -> None:
        self._learner = learner
        self._rule = rule = learner.rule
        self._topology = learner.topology
        self._replica = learner.replica
        self._caller = caller
        self.told: Values | None = None
        self._gradients = (
            GradientBuffer(learner.parameters, learner.topology, learner.engine)
            if rule.averages == "gradients"
            else None
        )

    # -- means of the rule ----------------------------------------------------------------------------------------

    def take(self, scope: Scope, progress: Progress, told: Told | None = None) -> Event:
        """Take and merge the mean that is due at this step. Collective over `scope`.

        Parameters
        ----------
        scope : the learners that take part.
        progress : this learner's progress.
        told : what this learner tells the others for the schedule; None on all learners: nothing.

        Raises
        ------
        SickLearnersError
            On all of `scope`, if sick learners stop the run.
        """
        started = time.perf_counter()
        is_global = scope is GLOBAL
        call = self._caller.call(kind_of(scope), progress)
        learner, self.told = self._learner, None
        if self._gradients is not None:
            error = self._try_refresh()

            def meet_with(fingerprint: int) -> Meeting:
                return self._caller.meet(call, scope, error=error, fingerprint=fingerprint)

            self._gradients.average(scope, meet_with, call)
            # All steps so far took the same gradients on all learners, so the parameters must be equal.
            learner.equality.compare(
                progress.round + 1, progress.step, lambda: {"parameters": learner.parameters.arrays}
            )
            return self._event(scope, progress, started, self._gradients.num_bytes, math.nan, ())
        how, how_buffers = (self._rule.how, self._rule.how_buffers) if is_global else (replace, replace)
        event = self._average(call, scope, how, how_buffers, progress, started, told=told)
        if is_global:
            learner.equality.compare(progress.round + 1, progress.step, partial(learner.equal_after, how, how_buffers))
        return event

    def take_final(self, progress: Progress) -> Event:
        """Take the final mean: every learner then holds it. Collective over all learners."""
        started = time.perf_counter()
        call = self._caller.call(Kind.FINISH, progress)
        event = self._average(call, GLOBAL, replace, replace, progress, started, exact=True)
        self._learner.equality.compare(0, progress.step, partial(self._learner.equal_after, replace, replace))
        return event

    def _average(
        self,
        call: Call,
        scope: Scope,
        how: Merge,
        how_buffers: Merge,
        progress: Progress,
        started: float,
        exact: bool = False,
        told: Told | None = None,
    ) -> Event:
        """Take the mean over `scope` and merge it."""
        learner = self._learner
        is_global, is_mixed = scope is GLOBAL, isinstance(scope, Neighbours)
        out_of_place = how.reads_parameters or (is_global and learner.options.measure_distance)
        before: list[Array] | None = None

        def take() -> tuple[Excluded, float, list[Tensor]]:
            nonlocal before
            is_sick, is_large = learner.examine()
            meeting = self._caller.meet(
                call,
                scope,
                error=error,
                is_sick=is_sick,
                is_large=is_large,
                rate=learner.rate,
                fingerprint=learner.outer.fingerprint() if is_global else 0,
                told=told,
                packed=None if is_mixed else learner.small.pack(is_sick),
            )
            self.told = None if told is None else meeting.told
            check_same_start(meeting.fingerprints)
            excluded = self._excluded(meeting, scope, is_sick)
            learner.check_excluded(excluded, scope, call)
            learner.awaits_mean = is_sick
            if excluded.are_all and not is_mixed:  # a local group: it takes the next global mean from the others
                return excluded, meeting.rate, []
            is_large = meeting.is_large
            before = learner.held(not out_of_place) if is_global else None
            means = [
                *learner.take(learner.parameters, scope, out_of_place, excluded, is_large, exact, meeting),
                *learner.take(learner.buffers, scope, how_buffers.reads_parameters, excluded, is_large, exact, meeting),
            ]
            # Neighbours know of different sick learners, but must all make the same exchanges.
            if excluded.learners or is_mixed:
                means += learner.take(learner.kept_buffers, scope, True, excluded, is_large, exact=True)
            return excluded, meeting.rate, [] if excluded.are_all else means

        distance = math.nan
        with torch.no_grad():
            error = self._try_refresh()
            excluded, rate, means = self._topology.run_collective(take, scope, call)
            if is_global:
                learner.outer.settle()
            if means:
                distance = learner.merge(means, how, how_buffers, excluded, before, rate)
        learner.means_of_none = learner.means_of_none + 1 if excluded.are_all else 0
        if excluded.are_all:
            return self._event(scope, progress, started, 0, math.nan, excluded.learners)
        num_bytes = learner.parameters.num_bytes + learner.buffers.num_bytes
        if is_global:
            num_bytes += learner.end_global(how)
        return self._event(scope, progress, started, num_bytes, distance, excluded.learners)

    def _excluded(self, meeting: Meeting, scope: Scope, is_sick: bool) -> Excluded:
        """Return the learners that this learner's mean leaves out."""
        if not isinstance(scope, Neighbours):
            return Excluded(meeting.sick, meeting.num_members, is_sick)
        weights = self._topology.links(scope).weights
        return Excluded(tuple(learner for learner in meeting.sick if learner in weights), len(weights), is_sick)

    def _event(
        self, scope: Scope, progress: Progress, started: float, num_bytes: int, distance: float, sick: tuple[int, ...]
    ) -> Event:
        blocked_s, since_made_s = time.perf_counter() - started, started - self._learner.made
        period_steps = progress.step - progress.round_step
        return Event(progress.step, scope, period_steps, since_made_s, blocked_s, blocked_s, num_bytes, distance, sick)

    # -- means outside of the rule --------------------------------------------------------------------------------

    def replace_by_mean(self, kind: Kind, progress: Progress, *flats: FlatBuffer) -> None:
        """Replace tensors by their exact mean over all learners. Collective over all learners.

        Sick learners are left out, unless all are sick.

        Parameters
        ----------
        kind : what the mean is for.
        progress : this learner's progress.
        *flats : hold the tensors.
        """
        error = self._try_refresh()
        call = self._caller.call(kind, progress)
        learner = self._learner

        def take() -> list[Tensor]:
            arrays = [array for flat in flats for array in flat.arrays]
            is_sick, is_large = learner.examine(arrays)
            meeting = self._caller.meet(call, error=error, is_sick=is_sick, is_large=is_large)
            excluded = self._excluded(meeting, GLOBAL, is_sick)
            if excluded.are_all:
                excluded = Excluded((), excluded.num_members, False)
            return [
                mean
                for flat in flats
                for mean in learner.take(flat, GLOBAL, False, excluded, meeting.is_large, exact=True)
            ]

        with torch.no_grad():
            means = self._topology.run_collective(take, what=call)
            for array, mean in zip((array for flat in flats for array in flat.arrays), means, strict=True):
                replace.apply(array, mean, {}, 0.0)
            self._replica.put_back_constants()

    # -- comparisons without a mean -------------------------------------------------------------------------------

    def check_health(self, progress: Progress, what: str) -> None:
        """Raise `SickLearnersError` on all learners if they could take no global mean now. Collective over them.

        Parameters
        ----------
        progress : this learner's progress.
        what : what is about to happen, for the message.
        """
        error = self._try_refresh()
        with torch.no_grad():
            is_sick, _ = self._learner.examine()
        meeting = self._caller.meet_all(Kind.CHECK_HEALTH, progress, is_sick=is_sick, error=error)
        excluded = Excluded(meeting.sick, meeting.num_members, is_sick)
        self._learner.check_excluded(excluded, GLOBAL, f"{what} of step {progress.step}")

    def update_learners_agree(self, kind: Kind, progress: Progress) -> None:
        """Clear `learners_agree` if the learners' parameters or buffers differ by now. Collective over all learners.

        A forward pass in train mode changes buffers, and the caller may have loaded weights.
        """
        learner = self._learner
        held = [*learner.parameters.arrays, *learner.buffers.arrays] if learner.learners_agree else []
        learner.learners_agree = len(set(self._fingerprints(kind, progress, held))) == 1 and learner.learners_agree

    def require_equal_parameters(self, kind: Kind, progress: Progress) -> None:
        """Raise `InputError` on all learners if their parameters differ. Collective over them."""
        check_same_start(self._fingerprints(kind, progress, self._learner.parameters.arrays))

    def follow_start(self) -> None:
        """Let merges start from the current parameters. The next global mean compares them between the learners."""
        if self._learner.outer.tensors:
            self._replica.refresh()
            self._learner.outer.start()

    def _fingerprints(self, kind: Kind, progress: Progress, held: Sequence[Tensor]) -> Sequence[int]:
        """Return the fingerprints of all learners' `held`. Collective over all learners."""
        error = self._try_refresh()
        return self._caller.meet_all(kind, progress, error=error, fingerprint=fingerprint(held)).fingerprints

    def _try_refresh(self) -> InputError | None:
        """Refresh the replica; return the error if it fails, so that the next meeting raises it on all learners."""
        try:
            self._replica.refresh()
        except InputError as error:
            return error
        return None
