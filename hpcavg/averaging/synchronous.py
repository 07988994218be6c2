"""Means that the learners wait for, and what learners tell each other outside of means."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hpcavg.algorithms.merge import Merge, replace
from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours, Scope
from hpcavg.averaging.calls import Call, Caller, Kind, Meeting, Told, kind_of
from hpcavg.averaging.events import Event
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.gradients import GradientBuffer
from hpcavg.averaging.health import Excluded, check_same_start, fingerprint
from hpcavg.averaging.learner_means import LearnerMeans, Part
from hpcavg.engines.reduction import Values
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

    def take(self, scope: Scope, progress: Progress, told: Sequence[Told] | None = None) -> Event:
        """Take and merge the mean that is due at this step. Collective over `scope`.

        Parameters
        ----------
        scope : the learners that take part.
        progress : this learner's progress.
        told : what each learner of this rank tells the others for the schedule; None on all ranks: nothing.

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
            return self._event(scope, progress, started, self._gradients.num_bytes, (), ())
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
        told: Sequence[Told] | None = None,
    ) -> Event:
        """Take the mean over `scope` and merge it."""
        learner = self._learner
        is_global = scope is GLOBAL
        out_of_place = how.reads_parameters or (is_global and learner.options.measure_distance)
        is_apart = how_buffers.reads_parameters
        with torch.no_grad():
            error = self._try_refresh()
            before = learner.held(not out_of_place) if is_global else None
            meeting, taken = self._topology.run_collective(
                lambda: self._means(call, scope, error, told, out_of_place, is_apart, exact), scope, call
            )
            self.told = None if told is None else meeting.told
            if is_global:
                learner.outer.settle()
            distances: list[float] = []
            num_merged = 0
            for part, means in taken:
                is_merged = not part.excluded.are_all
                num_merged += is_merged
                for row in part.rows_here(range(part.num_learners)):
                    learner.means_of_none[row] = 0 if is_merged else learner.means_of_none[row] + 1
                if is_merged:
                    distances += learner.merge(part, means, how, how_buffers, before, meeting.rate)
            if num_merged:
                self._replica.put_back_constants()
        sick = tuple(sorted({each for part, _ in taken for each in part.excluded.learners}))
        if not num_merged:
            return self._event(scope, progress, started, 0, (), sick)
        num_bytes = learner.parameters.num_bytes + learner.buffers.num_bytes
        if is_global:
            num_bytes += learner.end_global(how)
        return self._event(scope, progress, started, num_bytes, distances if is_global else (), sick)

    def _means(
        self,
        call: Call,
        scope: Scope,
        error: InputError | None,
        told: Sequence[Told] | None,
        out_of_place: bool,
        is_apart: bool,
        exact: bool,
    ) -> tuple[Meeting, list[tuple[Part, list[Tensor]]]]:
        """Meet the learners of `scope`; return what they report, and the means for each part of this rank's learners.

        Collective over `scope`.
        """
        learner = self._learner
        sick_rows, is_large = learner.examine()
        is_mixed = isinstance(scope, Neighbours)
        meeting = self._caller.meet(
            call,
            scope,
            error=error,
            sick=sick_rows,
            is_large=is_large,
            rate=learner.rate,
            fingerprint=learner.outer.fingerprint() if scope is GLOBAL else 0,
            told=told,
            packed=None if is_mixed else learner.small.pack(sick_rows),
        )
        check_same_start(meeting.fingerprints)
        parts = self._parts(meeting, scope, sick_rows)
        for part in parts:
            learner.check_excluded(part, scope, call)
        learner.awaiting = sick_rows

        def means_of(part: Part) -> list[Tensor]:
            return learner.means_of(part, scope, meeting, out_of_place, is_apart, exact)

        if is_mixed:  # one exchange for all learners of the rank, each of which gets a mean of its own
            means = means_of(self._whole(meeting, sick_rows))
            return meeting, [(part, [mean[part.first or 0] for mean in means]) for part in parts]
        # A group without a learner that is well takes the next global mean from the others.
        return meeting, [(part, [] if part.excluded.are_all else means_of(part)) for part in parts]

    def _whole(self, meeting: Meeting, sick_rows: Sequence[int]) -> Part:
        """Return all learners of this rank."""
        return Part(Excluded(meeting.sick, meeting.num_members, sick_rows), self._topology.learners_per_rank)

    def _parts(self, meeting: Meeting, scope: Scope, sick_rows: Sequence[int]) -> list[Part]:
        """Return the learners of this rank that merge the same mean: all, those of a group inside the rank, or one."""
        topology = self._topology
        sick, first = meeting.sick, topology.learners.start
        if isinstance(scope, Neighbours):
            weights = topology.links(scope).weights
            return [
                Part(
                    Excluded(tuple(each for each in sick if each in of_row), len(of_row), (0,) * (row in sick_rows)),
                    1,
                    row if len(weights) > 1 else None,
                )
                for row, of_row in enumerate(weights)
            ]
        groups = topology.groups_here
        if scope is not LOCAL or len(groups) == 1:
            return [self._whole(meeting, sick_rows)]
        parts = []
        for group in groups:
            rows = [row for row in sick_rows if group.start <= row < group.stop]
            size = group.stop - group.start
            excluded = Excluded(tuple(first + row for row in rows), size, tuple(row - group.start for row in rows))
            parts.append(Part(excluded, size, group.start))
        return parts

    def _event(
        self,
        scope: Scope,
        progress: Progress,
        started: float,
        num_bytes: int,
        distances: Sequence[float],
        sick: tuple[int, ...],
    ) -> Event:
        blocked_s, since_made_s = time.perf_counter() - started, started - self._learner.made
        period_steps = progress.step - progress.round_step
        return Event(progress.step, scope, period_steps, since_made_s, blocked_s, blocked_s, num_bytes, sick, distances)

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
            sick_rows, is_large = learner.examine(arrays)
            meeting = self._caller.meet(call, error=error, sick=sick_rows, is_large=is_large)
            excluded = self._whole(meeting, sick_rows).excluded
            if excluded.are_all:
                excluded = Excluded((), excluded.num_members, ())
            return learner.take(arrays, GLOBAL, False, excluded, meeting.is_large, exact=True)

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
            sick_rows, _ = self._learner.examine()
        meeting = self._caller.meet_all(Kind.CHECK_HEALTH, progress, sick=sick_rows, error=error)
        self._learner.check_excluded(self._whole(meeting, sick_rows), GLOBAL, f"{what} of step {progress.step}")

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
