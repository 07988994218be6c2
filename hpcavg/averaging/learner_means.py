"""What blocking and delayed means share: the tensors, the excluded learners, taking the mean, merging it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpcavg.algorithms.merge import Merge, State, replace
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.scope import GLOBAL, Neighbours, Scope
from hpcavg.averaging import health
from hpcavg.averaging.calls import Meeting
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.health import EqualityCheck, Excluded, sample_of, squared_distance
from hpcavg.averaging.optimizer_state import StateAverager, forget
from hpcavg.averaging.outer_state import OuterState
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.small_arrays import SmallArrays
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means, take_means_of_large
from hpcavg.engines.reduction import Array, as_array, copy_of


class LearnerMeans:
    """Takes means of one learner's parameters and buffers, and merges them.

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
    awaits_mean : this learner is sick, and stays so until it merges a mean: its parameters may be finite again, but
        they are meaningless.
    means_of_none : the number of last means for which no learner was well.
    made : when this object was made, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        rule: Rule,
        engine: Engine,
        topology: Topology,
        optimizer: torch.optim.Optimizer,
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
        self.awaits_mean = False
        self.means_of_none = 0
        self._optimizer = optimizer
        self._state = StateAverager(optimizer, topology)
        self.made = time.perf_counter()

    @property
    def rate(self) -> float:
        """The local learning rate, of the first parameter group: the others are taken to be proportional to it."""
        return float(self._optimizer.param_groups[0]["lr"])

    # -- sick learners --------------------------------------------------------------------------------------------

    def examine(self, arrays: Sequence[Array] | None = None) -> tuple[bool, bool]:
        """Return whether this learner is sick, and whether the sum of all learners' values may overflow.

        Parameters
        ----------
        arrays : the values, each of shape (learners, numel). None: the parameters and the averaged buffers.
        """
        arrays = [*self.parameters.values, *self.buffers.values] if arrays is None else arrays
        is_finite, is_large = health.examine(arrays, self.topology.num_learners)
        return self.awaits_mean or not is_finite, is_large

    def check_excluded(self, excluded: Excluded, scope: Scope, what: object) -> None:
        """Raise `SickLearnersError` on all of `scope` if sick learners stop the run. Collective if a learner is sick.

        They do so if `options.non_finite` is ``"stop"``, or if no learner is left for a global mean. On a graph, a
        learner that is well restores all others within as many means as there are learners that they do not meet.

        Parameters
        ----------
        excluded : the sick learners.
        scope : the learners that take part.
        what : the name of the mean in the message.
        """
        num_others = self.topology.num_learners - excluded.num_members
        is_last_mean = scope is GLOBAL or (isinstance(scope, Neighbours) and self.means_of_none >= num_others)
        is_over = excluded.are_all and is_last_mean
        if excluded.learners and (is_over or self.options.non_finite == "stop"):
            health.raise_sick(excluded, scope, self.topology, str(what), self.replica.name_non_finite())

    # -- taking ---------------------------------------------------------------------------------------------------

    def take(
        self,
        flat: FlatBuffer,
        scope: Scope,
        out_of_place: bool,
        excluded: Excluded,
        is_large: bool,
        exact: bool,
        meeting: Meeting | None = None,
    ) -> list[Tensor]:
        """Return the mean of every array over `scope` without the sick learners. Collective over the scope.

        If ranks may die, the means go to separate memory, so an interrupted mean leaves the parameters intact.

        Parameters
        ----------
        flat : holds the arrays. A sick learner's become zero.
        scope : the learners that take part.
        out_of_place : leave the arrays intact.
        excluded : the sick learners.
        is_large : the sum of all learners' values may overflow.
        exact : compress nothing.
        meeting : the reports of the learners, with which small arrays have travelled.
        """
        arrays, rows = flat.arrays, flat.rows
        if not arrays:
            return []
        out_of_place = out_of_place or self.topology.survives
        small = {} if meeting is None else self.small.means(arrays, scope, meeting, out_of_place, excluded)
        if small:
            rest = [index for index in range(len(arrays)) if index not in small]
            arrays, rows = [arrays[index] for index in rest], [rows[index] for index in rest]
        excluded.zero_contribution(arrays)
        if isinstance(scope, Neighbours):  # weights sum to 1, so no sum of large values overflows
            means = take_means(self.engine, arrays, scope, out_of_place)
            return excluded.rescale(means, self.topology.links(scope).weights)
        if is_large:
            means = take_means_of_large(self.engine, arrays, scope, excluded.num_members, excluded.num_well)
        else:
            means = take_means(self.engine, arrays, scope, out_of_place, excluded.num_well, exact, rows)
        if small:
            others = iter(means)
            means = [small[index] if index in small else next(others) for index in range(len(flat.arrays))]
        return means

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
        means: Sequence[Tensor],
        how: Merge,
        how_buffers: Merge,
        excluded: Excluded,
        before: Sequence[Array] | None,
        rate: float,
    ) -> float:
        """Merge means into parameters and buffers; return this learner's ||x_j - x̄||² before, or NaN.

        A sick learner takes the means of everything, and its optimizer starts anew.

        Parameters
        ----------
        means : those of the parameters' arrays, of the buffers', and of the kept buffers' if learners are sick.
        how : how parameters are merged.
        how_buffers : how buffers are merged.
        excluded : the sick learners.
        before : what `held` returned; None: do not measure the distance.
        rate : the local learning rate.
        """
        arrays = self.parameters.arrays
        num_arrays, num_buffers = len(arrays), len(self.buffers.arrays)
        distance = 0.0
        for index, (array, mean, state) in enumerate(zip(arrays, means, self.outer.states, strict=False)):
            if before is not None:
                is_in_place = mean is self.parameters.rows[index]
                values = self.parameters.values[index][0] if is_in_place else as_array(mean)
                distance += squared_distance(before[index], values)
            self._merge_array(array, mean, how, state, excluded, rate)
        for array, mean in zip(self.buffers.arrays, means[num_arrays : num_arrays + num_buffers], strict=True):
            self._merge_array(array, mean, how_buffers, {}, excluded, rate)
        if excluded.is_here:
            for array, mean in zip(self.kept_buffers.arrays, means[num_arrays + num_buffers :], strict=True):
                replace.apply(array, mean, {}, 0.0)
            forget(self._optimizer)
            self.awaits_mean = False
        self.replica.put_back_constants()
        return math.nan if excluded.is_here or before is None else distance

    def _merge_array(
        self,
        array: Tensor,
        mean: Tensor,
        merge: Merge,
        state: State,
        excluded: Excluded,
        rate: float,
    ) -> None:
        if excluded.is_here and merge.reads_parameters:
            merge = replace  # a sick learner's parameters are meaningless
        merge.apply(array, mean, state, rate)

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

    def state_dict(self) -> dict[str, Any]:
        """Return what the next mean depends on besides model and optimizer, as plain values and tensors."""
        return {
            "merge": self.outer.state_dict(),
            "learners_agree": self.learners_agree,
            "awaits_mean": self.awaits_mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.outer.load_state_dict(state["merge"])
        self.learners_agree = state["learners_agree"]
        self.awaits_mean = state["awaits_mean"]
