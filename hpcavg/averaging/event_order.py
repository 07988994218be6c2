"""The order of events of asynchronous learners in simulated time. Without torch and MPI."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hpcavg.config.sections.averaging import read_step_times


class Completion(NamedTuple):
    """The end of one step of a learner.

    Attributes
    ----------
    learner : the learner.
    time : simulated time, in mean durations of a step.
    """

    learner: int
    time: float


class EventOrder:
    """Says in which order learners complete their steps. Each begins its next step when the last one is completed.

    The order depends on the arguments alone, not on how many learners are computed at once.

    Parameters
    ----------
    num_learners : number of learners.
    step_times : durations of their steps; see `hpcavg.AveragingOptions`.
    seed : seeds a generator for each learner, which draws durations and the order of simultaneous completions.
    total_steps : steps of each learner. None: without end.

    Attributes
    ----------
    ready : the learners whose next step must be computed now, in ascending order. Empty: all have taken their steps.

    Examples
    --------
    Learner 1 is slower. When learner 0 has completed its first step, it must compute the next one, which ends before
    the first one of learner 1:

    >>> from hpcavg.averaging.event_order import EventOrder
    >>> order = EventOrder(2, "slow:2.5")
    >>> for _ in range(3):
    ...     print(order.ready, [tuple(completion) for completion in order.compute()])
    [0, 1] [(0, 1.0)]
    [0] [(0, 2.0), (1, 2.5)]
    [0, 1] [(0, 3.0)]
    """

    def __init__(
        self, num_learners: int, step_times: str = "constant", seed: int = 0, total_steps: int | None = None
    ) -> None:
        self._duration = _durations(step_times, num_learners)
        self._total_steps = total_steps
        # Unlike default_rng([seed, learner]), this shares no stream with the samples of the run.
        seeds = [np.random.SeedSequence(seed % 2**63, spawn_key=(learner,)) for learner in range(num_learners)]
        self._generators = list(map(np.random.default_rng, seeds))
        self._steps = [0] * num_learners  # that each learner has completed
        self._queue: list[tuple[float, float, int]] = []  # of each learner: when its step ends, a tie-break, itself
        self.ready = list(range(num_learners))
        for learner in self.ready:
            self._begin(learner, 0.0)

    def _begin(self, learner: int, time: float) -> None:
        generator = self._generators[learner]
        end = time + self._duration(learner, generator)
        heapq.heappush(self._queue, (end, generator.random(), learner))

    def compute(self) -> list[Completion]:
        """Return, in order, the completions that are certain once the learners that are `ready` are computed.

        The others wait until learners that have become ready are computed: one of these may complete its step earlier.
        """
        completed: list[Completion] = []
        ready: set[int] = set()
        while self._queue and self._queue[0][-1] not in ready:
            time, _, learner = heapq.heappop(self._queue)
            completed.append(Completion(learner, time))
            self._steps[learner] += 1
            if self._steps[learner] != self._total_steps:
                self._begin(learner, time)
                ready.add(learner)
        self.ready = sorted(ready)
        return completed

    def drain(self) -> list[Completion]:
        """Return, in order, the completions of the steps that are computed; no learner begins another one."""
        completed = [Completion(learner, time) for time, _, learner in sorted(self._queue) if learner not in self.ready]
        self._queue, self.ready = [], []
        return completed

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue, as plain values."""
        return {
            "steps": list(self._steps),
            "queue": [list(entry) for entry in self._queue],
            "ready": list(self.ready),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._steps, self.ready = list(state["steps"]), list(state["ready"])
        self._queue = [(time, tie, learner) for time, tie, learner in state["queue"]]
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = saved


def _durations(step_times: str, num_learners: int) -> Callable[[int, np.random.Generator], float]:
    """Return the function that draws the duration of a learner's next step."""
    kind, number = read_step_times("step_times", step_times)
    if kind == "lognormal":
        return lambda learner, generator: float(generator.lognormal(-(number**2) / 2, number))
    slowest = num_learners - 1 if kind == "slow" else None
    return lambda learner, generator: number if learner == slowest else 1.0
