"""What blocking and delayed means share: the tensors, the excluded learners, taking the mean, merging it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from operator import add
from typing import Any, NamedTuple

from torch import Tensor

from hpcavg.algorithms.merge import Merge, State, replace
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.scope import GLOBAL, Neighbours, Scope
from hpcavg.averaging import health
from hpcavg.averaging.calls import Meeting
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.health import EqualityCheck, Excluded, sample_of, squared_distances
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.optimizer_state import StateAverager
from hpcavg.averaging.outer_state import OuterState
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.small_arrays import SmallArrays
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means, take_means_of_large, take_mixed
from hpcavg.engines.reduction import Array, as_array, copy_of


class Part(NamedTuple):
    """Learners of this rank that merge the same mean.

    Attributes
    ----------
    excluded : the sick learners; their rows are those of the part.
    num_learners : number of learners of the part.
    first : their first row in this rank; None if they are all learners of this rank.
    """

    excluded: Excluded
    num_learners: int
    first: int | None = None

    def of(self, arrays: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the part of arrays of shape (learners, numel)."""
        if self.first is None:
            return arrays
        return [array[self.first : self.first + self.num_learners] for array in arrays]

    def rows_here(self, rows: Sequence[int]) -> list[int]:
        """Return `rows` of the part as rows of this rank."""
        return [(self.first or 0) + row for row in rows]


class LearnerMeans:
    """Takes means of the parameters and buffers of this rank's learners, and merges them.

    Parameters
    ----------
    rule : the algorithm.
    engine : takes the means.
    topology : the learners.
    optimizer : the local optimizer.
    replica : holds the parameters and buffers.
    options : the averager's options.

    Attributes
    ----------
    parameters : the parameters that require a gradient.
    buffers : the buffers that every mean replaces; empty unless `options.buffers` is ``"average"``.
    small : those of their arrays that travel with the reports of the learners.
    kept_buffers : the buffers that only a sick learner takes from a mean; empty unless `options.buffers` is
        ``"keep"``.
    outer : what the merge keeps between global means.
    equality : compares what must be equal on all learners.
    learners_agree : all learners held the same parameters after the last mean, and no step followed.
    awaiting : the rows of the learners that are sick, and stay so until they merge a mean: their parameters may be
        finite again, but they are meaningless.
    means_of_none : for each learner of this rank, the number of its last means for which no learner was well.
    made : when this object was made, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        rule: Rule,
        engine: Engine,
        topology: Topology,
        optimizer: LocalOptimizer,
        replica: Replica,
        options: AveragingOptions,
    ) -> None:
        self.rule = rule
        self.engine = engine
        self.topology = topology
        self.replica = replica
        self.options = options
        self.parameters = replica.parameters
        self.buffers = replica.buffers if options.buffers == "average" else FlatBuffer([])
        self.kept_buffers = replica.buffers if options.buffers == "keep" else FlatBuffer([])
        takes_means = rule.averages == "parameters" and rule.server is None
        self.small = SmallArrays([self.parameters, self.buffers] if takes_means else [], topology)
        self.outer = OuterState(rule.how, replica.parameters)
        self.equality = EqualityCheck(topology, options.check_rounds, replica.frozen)
        self.learners_agree = False
        self.awaiting: Sequence[int] = ()
        self.means_of_none = [0] * topology.learners_per_rank
        self._optimizer = optimizer
        self._state = StateAverager(optimizer, topology, replica.parameters.learners)
        self.made = time.perf_counter()

    @property
    def rate(self) -> float:
        """The local learning rate, of the first parameter group: the others are taken to be proportional to it."""
        return float(self._optimizer.optimizer.param_groups[0]["lr"])

    # -- sick learners --------------------------------------------------------------------------------------------

    def examine(self, arrays: Sequence[Array] | None = None) -> tuple[Sequence[int], bool]:
        """Return the rows of the sick learners, and whether the sum of all learners' values may overflow.

        Parameters
        ----------
        arrays : the values, each of shape (learners, numel). None: the parameters and the averaged buffers.
        """
        arrays = [*self.parameters.values, *self.buffers.values] if arrays is None else arrays
        rows, is_large = health.examine_rows(arrays, self.topology.num_learners)
        return tuple(sorted({*self.awaiting, *rows})) if self.awaiting else rows, is_large

    def check_excluded(self, part: Part, scope: Scope, what: object) -> None:
        """Raise `SickLearnersError` on all of `scope` if sick learners stop the run. Collective if a learner is sick.

        They do so if `options.non_finite` is ``"stop"``, or if no learner is left for a global mean. On a graph, a
        learner that is well restores all others within as many means as there are learners that they do not meet.

        Parameters
        ----------
        part : learners of this rank.
        scope : the learners that take part.
        what : the name of the mean in the message.
        """
        excluded = part.excluded
        num_others = self.topology.num_learners - excluded.num_members
        is_last_mean = scope is GLOBAL or (
            isinstance(scope, Neighbours) and self.means_of_none[part.first or 0] >= num_others
        )
        is_over = excluded.are_all and is_last_mean
        if excluded.learners and (is_over or self.options.non_finite == "stop"):
            health.raise_sick(excluded, scope, self.topology, str(what), self.replica.name_non_finite())

    # -- taking ---------------------------------------------------------------------------------------------------

    def take(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        out_of_place: bool,
        excluded: Excluded,
        is_large: bool,
        exact: bool,
        meeting: Meeting | None = None,
    ) -> list[Tensor]:
        """Return the mean of every array over `scope` without the sick learners. Collective over the scope.

        It has shape (numel,), or is the array itself, every row of which has become the mean. On a graph, each learner
        has a mean of its own: shape (learners, numel).

        If ranks may die, the means go to separate memory, so an interrupted mean leaves the parameters intact.

        Parameters
        ----------
        arrays : each of shape (learners, numel): all rows of this rank, or those of a group inside it. A sick
            learner's become zero.
        scope : the learners that take part.
        out_of_place : leave the arrays intact.
        excluded : the sick learners.
        is_large : the sum of all learners' values may overflow.
        exact : compress nothing.
        meeting : the reports of the learners, with which small arrays have travelled.
        """
        if not arrays:
            return []
        out_of_place = out_of_place or self.topology.survives
        small = {} if meeting is None else self.small.means(arrays, scope, meeting, out_of_place, excluded)
        if small:
            rest = [array for index, array in enumerate(arrays) if index not in small]
            others = iter(self.take(rest, scope, out_of_place, excluded, is_large, exact))
            return [small[index] if index in small else next(others) for index in range(len(arrays))]
        excluded.zero_contribution(arrays)
        if isinstance(scope, Neighbours):  # weights sum to 1, so no sum of large values overflows
            means = take_mixed(self.engine, arrays, scope, out_of_place)
            return excluded.rescale(means, self.topology.links(scope).weights)
        if is_large:
            return take_means_of_large(self.engine, arrays, scope, excluded.num_members, excluded.num_well)
        return take_means(self.engine, arrays, scope, out_of_place, excluded.num_well, exact)

    def means_of(
        self, part: Part, scope: Scope, meeting: Meeting, out_of_place: bool, is_apart: bool, exact: bool
    ) -> list[Tensor]:
        """Return the means for `merge`: of the parameters, the buffers, and the kept buffers if learners are sick.

        Collective over the scope.

        Parameters
        ----------
        part : learners of this rank.
        scope : the learners that take part.
        meeting : their reports.
        out_of_place : leave the parameters intact.
        is_apart : leave the buffers intact.
        exact : compress nothing.
        """
        excluded, is_large = part.excluded, meeting.is_large
        # Neighbours know of different sick learners, but must all make the same exchanges.
        kept = self.kept_buffers.arrays if excluded.learners or isinstance(scope, Neighbours) else []
        given = None if part.first is not None else meeting
        return [
            *self.take(part.of(self.parameters.arrays), scope, out_of_place, excluded, is_large, exact, given),
            *self.take(part.of(self.buffers.arrays), scope, is_apart, excluded, is_large, exact, given),
            *self.take(part.of(kept), scope, True, excluded, is_large, exact=True),
        ]

    def held(self, is_copy: bool) -> list[Array]:
        """Return the parameters before a mean, for their distance from it: a sample, unless the options ask for all.

        Parameters
        ----------
        is_copy : the mean will replace the parameters.
        """
        if self.options.measure_distance:
            return self.parameters.values
        samples = list(map(sample_of, self.parameters.values))
        return list(map(copy_of, samples)) if is_copy else samples

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(
        self,
        part: Part,
        means: Sequence[Tensor],
        how: Merge,
        how_buffers: Merge,
        before: Sequence[Array] | None,
        rate: float,
    ) -> list[float]:
        """Merge means into parameters and buffers; return each learner's ||x_j - x̄||² before: NaN for the sick.

        A sick learner takes the means of everything, and its optimizer starts anew.

        Parameters
        ----------
        part : the learners that merge.
        means : those of the parameters' arrays, of the buffers', and of the kept buffers' if learners are sick.
        how : how parameters are merged.
        how_buffers : how buffers are merged.
        before : what `held` returned; None: do not measure the distances.
        rate : the local learning rate.
        """
        num_arrays, num_buffers = len(self.parameters.arrays), len(self.buffers.arrays)
        sick = list(part.excluded.rows)
        distances = [math.nan if before is None else 0.0] * part.num_learners
        for index, (array, mean, state) in enumerate(
            zip(part.of(self.parameters.arrays), means, self.outer.states, strict=False)
        ):
            if before is not None:
                values = self.parameters.values[index][0] if mean is array else as_array(mean)
                distances = list(map(add, distances, squared_distances(before[index], values)))
            _merge_array(array, mean, how, state, sick, rate)
        means = means[num_arrays:]
        for array, mean in zip(part.of(self.buffers.arrays), means[:num_buffers], strict=True):
            _merge_array(array, mean, how_buffers, {}, sick, rate)
        if sick:
            for array, mean in zip(part.of(self.kept_buffers.arrays), means[num_buffers:], strict=True):
                array[sick] = mean
            here = part.rows_here(sick)
            self._optimizer.forget(here)
            self.awaiting = tuple(row for row in self.awaiting if row not in here)
        for row in sick:
            distances[row] = math.nan
        return distances

    def end_global(self, how: Merge) -> int:
        """Treat the optimizer's state after a global mean; return the bytes of its mean. Collective over all learners.

        Parameters
        ----------
        how : how the mean of the parameters was merged.
        """
        num_bytes = self._state.treat(self.options.optimizer_state, self.engine)
        self.learners_agree = how.agrees
        return num_bytes

    def equal_after(self, how: Merge, how_buffers: Merge) -> dict[str, list[Tensor]]:
        """Return, by name, the tensors that are equal on all learners after a global mean was merged this way."""
        return {
            "parameters": self.parameters.arrays if how.agrees else [],
            "buffers": self.buffers.arrays if how_buffers.agrees else [],
            "outer state": self.outer.tensors,
        }

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return what a learner's next mean depends on besides model and optimizer, as plain values and tensors."""
        return {
            "merge": self.outer.state_dict(),
            "learners_agree": self.learners_agree,
            "awaits_mean": row in self.awaiting,
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state_dict_of` returned for each learner of the rank."""
        self.outer.load_state_dict(states[0]["merge"])
        self.learners_agree = all(state["learners_agree"] for state in states)
        self.awaiting = tuple(row for row, state in enumerate(states) if state["awaits_mean"])


def _merge_array(array: Tensor, mean: Tensor, merge: Merge, state: State, sick: list[int], rate: float) -> None:
    if mean is array:  # it was formed in place
        if merge is replace:
            return
        mean = array[0]
    merge.apply(array, mean, state, rate)
    if sick and merge.reads_parameters:  # a sick learner's parameters are meaningless
        array[sick] = mean
