"""WHEN: schedules of means and learning rates, as pure functions of a learner's progress.

A `Schedule` maps the `Progress` at a step to the `Scope` of the mean that is due, or to None. It keeps no state:
learners with the same progress get the same answer. If a schedule depends on the run (its length, its learners), a
function maps the `Run` to the schedule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpcavg.algorithms.scope import GLOBAL, LOCAL, Scope


@dataclass(frozen=True)
class Run:
    """What a schedule may know of a run before its first step.

    Attributes
    ----------
    num_learners : number of learners, P.
    learner : this learner's index.
    total_steps : steps of each learner, T; None if unknown.
    batch_size : samples per step of each learner; None if unknown.
    """

    num_learners: int = 1
    learner: int = 0
    total_steps: int | None = None
    batch_size: int | None = None


@dataclass
class Progress:
    """The progress of a learner. Steps count from 1. A round lasts from one global mean to the next.

    Attributes
    ----------
    step : the current step; 0 before the first.
    round : number of global means that were due so far.
    round_step : the step at which the last of them was due; 0 before the first.
    round_seconds : wall-clock seconds since the end of that mean.
    first_loss : mean training loss of all learners in the first round; None if the rule does not follow the loss.
    loss : the same of the last round.
    relative_speed : this learner's speed divided by the slowest learner's; 1 before it was measured.
    mean_step : the steps of all learners at the last global mean, averaged, if they go at their own pace.
    mean_speed : the mean of all learners' relative speeds.

    Examples
    --------
    >>> from hpcavg.algorithms.schedule import Progress, every
    >>> [step for step in range(1, 10) if every(4)(Progress(step=step))]
    [4, 8]
    """

    step: int = 0
    round: int = 0
    round_step: int = 0
    round_seconds: float = field(default=0.0, compare=False)
    first_loss: float | None = None
    loss: float | None = None
    relative_speed: float = 1.0
    mean_step: float = 0.0
    mean_speed: float = 1.0


Schedule = Callable[[Progress], "Scope | None"]
"""Maps the progress at a step to the scope of the mean that is due, or to None."""
RoundLength = Callable[[Progress], int]
"""Maps the progress to the number of steps of the current round."""
Rate = Callable[[Progress, float], float]
"""Maps the progress at a step and the optimizer's rate at the start to the step's learning rate."""


def never(progress: Progress) -> Scope | None:
    """Return None: no mean is ever due."""
    return None


def every(period_steps: int) -> Schedule:
    """Return the schedule of a global mean every `period_steps` steps: t mod K = 0 (K-AVG, Algorithm 1).

    Examples
    --------
    >>> from hpcavg.algorithms.schedule import Progress, every
    >>> print(every(4)(Progress(step=8)), every(4)(Progress(step=9)))
    global None
    """

    def due(progress: Progress) -> Scope | None:
        return GLOBAL if progress.step % period_steps == 0 else None

    return due


def hierarchical(local_period_steps: int, global_period_steps: int) -> Schedule:
    """Return the schedule of local means within the periods of global means (Hier-AVG, Algorithm 1).

    A period has K2 steps and ends with a global mean. Local means are due at its steps K1, 2 K1, ... before the last.
    K2 need not be a multiple of K1.

    Parameters
    ----------
    local_period_steps : K1.
    global_period_steps : K2.

    Examples
    --------
    >>> from hpcavg.algorithms.schedule import Progress, hierarchical
    >>> [str(hierarchical(2, 5)(Progress(step=step))) for step in range(1, 6)]
    ['None', 'local', 'None', 'local', 'global']
    """

    def due(progress: Progress) -> Scope | None:
        phase = progress.step % global_period_steps
        if phase == 0:
            return GLOBAL
        return LOCAL if phase % local_period_steps == 0 else None

    return due


def in_rounds(length: RoundLength) -> Schedule:
    """Return the schedule of a global mean after every round of `length` steps, which may change between rounds."""

    def due(progress: Progress) -> Scope | None:
        return GLOBAL if progress.step - progress.round_step >= length(progress) else None

    return due


def cut_at_end(length: RoundLength, total_steps: int | None) -> RoundLength:
    """Return `length`, but let the last round end with the run if `total_steps` is known."""
    if total_steps is None:
        return length
    return lambda progress: min(length(progress), total_steps - progress.round_step)


def in_seconds(budget_s: float, total_steps: int | None = None) -> Schedule:
    """Return the schedule of a global mean at the first step after `budget_s` seconds (PR-SGD, after Algorithm 3).

    Parameters
    ----------
    budget_s : seconds from the end of the last global mean.
    total_steps : steps of the run. No learner takes more steps in a round than the mean learner has left. None: there
        is no such limit.
    """

    def due(progress: Progress) -> Scope | None:
        steps = progress.step - progress.round_step
        is_over = total_steps is not None and steps >= total_steps - progress.mean_step
        return GLOBAL if is_over or progress.round_seconds >= budget_s else None

    return due


# -- lengths of rounds --------------------------------------------------------------------------------------------


def switched_length(switch_step: int, steps_after: int) -> RoundLength:
    """Return H = 1 up to step `switch_step`, then H = `steps_after` (post-local SGD, Lin et al. 2018)."""
    return lambda progress: 1 if progress.round_step < switch_step else steps_after


def restart_length(num_learners: int) -> RoundLength:
    """Return K^s = ceil(s^(1/3) / N) steps in epoch s = 1, 2, ... (PR-SGD, Theorem 2)."""
    return lambda progress: _ceil_cube_root(progress.round + 1, num_learners**3)


def linear_length(first_steps: int, numerator: int, denominator: int) -> RoundLength:
    """Return τ_i = (1 + i α) τ_0 steps, rounded up, with α = numerator / denominator (LUPA-SGD, section 6).

    Examples
    --------
    >>> from hpcavg.algorithms.schedule import Progress, linear_length
    >>> [linear_length(4, 1, 2)(Progress(round=i)) for i in range(4)]
    [4, 6, 8, 10]
    """
    return lambda progress: -(-(denominator + progress.round * numerator) * first_steps // denominator)


def filling_length(first_steps: int, num_rounds: int, total_steps: int) -> RoundLength:
    """Return τ_i = (1 + i α) τ_0, with the α for which `num_rounds` rounds make `total_steps` (LUPA-SGD, section 6).

    The ends of the rounds are rounded up, not their lengths: only this gives exactly `num_rounds` rounds. If the rounds
    are too long even with α = 0, the end of the run cuts the last one.

    Parameters
    ----------
    first_steps : τ_0.
    num_rounds : the number of rounds, E.
    total_steps : steps of the run.
    """
    growth = max(0, total_steps - num_rounds * first_steps)

    def length(progress: Progress) -> int:
        i = progress.round
        # Σ_{j <= i} (1 + j α) τ_0, with α τ_0 = 2 growth / (E (E - 1))
        grown = -(-growth * i * (i + 1) // max(1, num_rounds * (num_rounds - 1)))
        return first_steps * (i + 1) + grown - progress.round_step

    return length


def loss_length(first_steps: int) -> RoundLength:
    """Return τ_i = ceil((F(x̄_0) / F(x̄_i))^(1/3)) τ_0, at least τ_0 (LUPA-SGD, eq. 11)."""

    def length(progress: Progress) -> int:
        first, last = progress.first_loss, progress.loss
        if first is None or last is None or not (0 < last < math.inf and 0 < first / last < math.inf):
            return first_steps
        return _ceil_cube_root(first, last) * first_steps

    return length


def listed_length(lengths: Sequence[int], learner: int, total_steps: int | None) -> RoundLength:
    """Return the learner's own length, the same in every round (PR-SGD, Algorithm 3).

    The last round is shorter, in proportion, so the mean learner ends with the run.

    Parameters
    ----------
    lengths : steps per round, by learner.
    learner : this learner's index.
    total_steps : steps of the run, averaged over the learners; None if unknown.
    """

    @functools.cache
    def of_at_most(most: int) -> int:
        return lengths[learner] if sum(lengths) <= most else _cut(lengths, most)[learner]

    if total_steps is None:
        return lambda progress: lengths[learner]
    return lambda progress: of_at_most(round((total_steps - progress.mean_step) * len(lengths)))


def _cut(lengths: Sequence[int], total: int) -> list[int]:
    """Return lengths in proportion to `lengths` whose sum is `total`, which is smaller; each is at least 1."""
    spare, rest = max(0, total - len(lengths)), sum(lengths) - len(lengths)
    shares = [divmod((length - 1) * spare, rest) for length in lengths]
    cut = [1 + steps for steps, _ in shares]
    by_remainder = sorted(range(len(cut)), key=lambda index: -shares[index][1])
    for index in by_remainder[: spare - sum(steps for steps, _ in shares)]:
        cut[index] += 1
    return cut


def speed_length(slowest_steps: int, total_steps: int | None) -> RoundLength:
    """Return I_i steps in proportion to the learner's speed (PR-SGD, before Algorithm 3).

    The last round is shortened for all learners by the same factor, so the mean learner exceeds the run's steps by less
    than one.

    Parameters
    ----------
    slowest_steps : steps per round of the slowest learner.
    total_steps : steps of the run, averaged over the learners; None if unknown.
    """

    def length(progress: Progress) -> int:
        steps = slowest_steps * progress.relative_speed
        if total_steps is not None:
            part = (total_steps - progress.mean_step) / (slowest_steps * progress.mean_speed)
            if part < 1:
                return max(1, math.ceil(steps * part - 1e-9))
        return max(1, round(steps))

    return length


def longest_round(length: RoundLength, total_steps: int) -> int:
    """Return the steps of the longest round of a run.

    Parameters
    ----------
    length : depends on `Progress.round` and `Progress.round_step` only.
    total_steps : steps of the run.
    """
    cut, progress, longest = cut_at_end(length, total_steps), Progress(), 0
    while progress.round_step < total_steps:
        steps = cut(progress)
        longest = max(longest, steps)
        progress.round += 1
        progress.round_step += steps
    return longest


def _ceil_cube_root(numerator: float, denominator: float) -> int:
    """Return the smallest integer m >= 1 with m³ >= numerator / denominator; exact for integers."""
    m = max(1, math.ceil((numerator / denominator) ** (1 / 3)))
    return m + (m**3 * denominator < numerator)  # the root may have been rounded down to an integer


# -- learning rates that the theory couples to the algorithm ------------------------------------------------------


def restart_rate(num_learners: int) -> Rate:
    """Return γ^s = γ_0 N / s^(2/3) in epoch s = 1, 2, ... (PR-SGD, Theorem 2)."""
    return lambda progress, rate: rate * num_learners / (progress.round + 1) ** (2 / 3)


def inverse_time_rate(mu: float, shift: float) -> Rate:
    """Return η_t = 4 / (μ (t + a)), with t = 0 at the first step (LUPA-SGD, Theorem 1).

    The optimizer's own rate does not count.

    Parameters
    ----------
    mu : μ.
    shift : a.
    """
    return lambda progress, rate: 4 / (mu * (progress.step - 1 + shift))
