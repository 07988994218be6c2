"""PR-SGD: rounds that restart from the global mean, of equal, growing or the learners' own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.schedule import (
    Run,
    Schedule,
    every,
    in_rounds,
    in_seconds,
    listed_length,
    restart_length,
    restart_rate,
    speed_length,
)
from hpcavg.errors import InputError, require_integer, require_number


@algorithm(
    options={"interval": "steps between global means"},
    source="PR-SGD, Algorithm 1, eq. (2)",
    when="t mod interval = 0, before the step",
    who="all",
    how="replace, then step by the gradient taken before",
    sends="M/interval",
    choose="to follow the paper's analysis to the letter",
)
def pr_sgd(interval: int = 8) -> Rule:
    """Take the global mean every `interval` steps, then step by the learner's own gradient (PR-SGD, Alg. 1, eq. 2).

    The learner takes the gradient at its own parameters, before the mean replaces them. After the step the learners
    differ again.

    Parameters
    ----------
    interval : steps between global means, at least 1.

    Raises
    ------
    InputError
        If `interval` is not such an integer.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.pr_sgd(4).before_step
    True
    """
    require_integer("interval", interval, 1)
    return Rule(always(every(interval)), before_step=True)


@algorithm(
    source="PR-SGD, Algorithm 2, Theorem 2",
    when="after K^s = ceil(s^(1/3)/P) steps of epoch s",
    who="all",
    how="replace; the rate is the optimizer's times P/s^(2/3)",
    sends="M/K^s",
    choose="where the length of the run is not known beforehand",
)
def pr_sgd_time_varying() -> Rule:
    """Take a global mean after each epoch s = 1, 2, ... of ceil(s^(1/3)/P) steps (PR-SGD, Algorithm 2).

    The learning rate of epoch s is the optimizer's times P/s^(2/3). P is the number of learners.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.pr_sgd_time_varying().options
    {}
    """
    return Rule(
        lambda run: in_rounds(restart_length(run.num_learners)),
        rate=lambda run: restart_rate(run.num_learners),
    )


@algorithm(
    options={
        "local_steps": "steps of each learner between two means, as 9,9,9,3; auto goes by measured speed",
        "base_steps": "steps of the slowest learner between two means where local steps are auto",
        "epoch_seconds": "in their place: seconds between two means, in which each learner steps as often as it can",
    },
    source="PR-SGD, Algorithm 3",
    when="after I_i steps of learner i, or when epoch_seconds have passed",
    who="all, with equal weights",
    how="replace",
    sends="M/I_i",
    choose="where some learners are slower than others",
)
def pr_sgd_hetero(
    local_steps: Sequence[int] | Literal["auto"] = "auto",
    base_steps: int = 8,
    epoch_seconds: float | None = None,
) -> Rule:
    """Take a global mean after rounds in which every learner takes its own number of steps (PR-SGD, Algorithm 3).

    The steps of a run are those of the mean learner. The last round is cut to end with them.

    Parameters
    ----------
    local_steps : steps I_i of every learner between two means. ``"auto"``: every learner takes `base_steps` in the
        first round; from then on the slowest learner does, and the others take more in proportion to their speed.
    base_steps : steps of the slowest learner if `local_steps` is ``"auto"``, at least 1.
    epoch_seconds : instead of `local_steps`: a round lasts so many seconds, and every learner takes at least one step.

    Raises
    ------
    InputError
        If an argument is out of range, or both `local_steps` and `epoch_seconds` are given.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.pr_sgd_hetero(local_steps=[9, 9, 9, 3]).own_pace
    True
    """
    require_integer("base_steps", base_steps, 1)
    if epoch_seconds is not None:
        require_number("epoch_seconds", epoch_seconds, lambda s: s > 0, "a positive number of seconds")
        if local_steps != "auto":
            raise InputError("epoch_seconds", epoch_seconds, f"unset where local_steps = {local_steps}")
        return Rule(lambda run: in_seconds(epoch_seconds, run.total_steps), own_pace=True)
    if local_steps == "auto":
        return Rule(lambda run: in_rounds(speed_length(base_steps, run.total_steps)), agrees_on="speed", own_pace=True)
    steps_of = _local_steps(local_steps)

    def when_listed(run: Run) -> Schedule:
        if len(steps_of) != run.num_learners:
            raise InputError("local_steps", local_steps, f"{run.num_learners} numbers, one for each learner")
        return in_rounds(listed_length(steps_of, run.learner, run.total_steps))

    return Rule(when_listed, own_pace=len(set(steps_of)) > 1)


def _local_steps(given: object) -> tuple[int, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise InputError("local_steps", given, "a list of integers, one for each learner, or auto")
    for steps in given:
        require_integer("local_steps", steps, 1)
    return tuple(given)
