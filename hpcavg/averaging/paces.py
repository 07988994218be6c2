"""The paces of a rank's learners: which steps they have taken, which means are due, and who waits for one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run, Schedule
from hpcavg.algorithms.scope import Scope


@dataclass
class Pace:
    """Learners of a rank that take the same steps: all of them, or one that goes at its own pace.

    Attributes
    ----------
    rows : their rows.
    schedule : says which mean is due.
    progress : their progress.
    due : the mean, or the exchange with simulated servers, for which they wait; None: they take the next step.
    """

    rows: range
    schedule: Schedule
    progress: Progress
    due: Scope | None = None

    def end_round(self) -> None:
        """Begin the next round."""
        self.progress.round += 1
        self.progress.round_step = self.progress.step


class Paces(list[Pace]):
    """All learners of a rank.

    Parameters
    ----------
    rule : the algorithm.
    run : the run of the rank's first learner.
    learners : number of learners of the rank.
    own_pace : each learner goes at its own pace.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> from hpcavg.algorithms.schedule import Run
    >>> from hpcavg.averaging.paces import Paces
    >>> paces = Paces(algorithms.pr_sgd_hetero([2, 1]), Run(num_learners=2), learners=2, own_pace=True)
    >>> for _ in range(2):
    ...     paces.begin_step()
    ...     print(paces.due(), paces.active)
    None [0]
    global [0, 1]
    """

    def __init__(self, rule: Rule, run: Run, learners: int, own_pace: bool) -> None:
        every = [range(row, row + 1) for row in range(learners)] if own_pace else [range(learners)]
        super().__init__(
            Pace(rows, rule.when(replace(run, learner=run.learner + rows.start)), Progress()) for rows in every
        )

    @property
    def progress_of(self) -> list[Progress]:
        """The progress of each learner; learners that take the same steps share it."""
        return [pace.progress for pace in self for _ in pace.rows]

    @property
    def active(self) -> list[int]:
        """The rows of the learners that take the next step."""
        return [row for pace in self if pace.due is None for row in pace.rows]

    def begin_step(self) -> None:
        """Count a step of the learners that take it."""
        for pace in self:
            pace.progress.step += pace.due is None

    def due(self) -> Scope | None:
        """Return the mean that is due after the step. Learners for which it is due early wait for the others."""
        for pace in self:
            if pace.due is None:
                pace.due = pace.schedule(pace.progress)
        due = self[0].due
        if any(pace.due is None for pace in self):
            return None
        for pace in self:
            pace.due = None
        return due
