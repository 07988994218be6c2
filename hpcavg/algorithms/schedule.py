"""WHEN: pure functions of a learner's progress that say which mean a step takes, and at which learning rate.

A schedule is called with the `Progress` of the step being decided and returns the `Scope` of the mean that is
due, or None. It keeps no state, so every learner that agrees on its progress agrees on the answer. What needs to know
the run first (its length, its learners) is a function of `Run` that returns a schedule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpcavg.algorithms.scope import GLOBAL, LOCAL, Scope


@dataclass(frozen=True)
class Run:
    """What a run is, from its first step to its last.

    Attributes
    ----------
    num_learners : number of learners, P.
    learner : this learner's index.
    total_steps : steps of one learner, T; None if unknown.
    batch_size : samples of one learner and step; None if unknown.
    """

    num_learners: int = 1
    learner: int = 0
    total_steps: int | None = None
    batch_size: int | None = None


@dataclass
class Progress:
    """How far a learner is, in steps counted from 1, and what all learners agreed on at the last global mean.

    Attributes
    ----------
    step : the step being taken; 0 before the first.
    round : global means that were due so far.
    round_step : the step at which the last of them was due.
    round_seconds : wall-clock seconds since that mean was there.
    first_loss : training loss of the first round; None if the rule follows no loss.
    loss : training loss of the last round; None if the rule follows no loss.
    relative_speed : this learner's speed over the slowest learner's; 1 before it was measured.
    mean_speed : mean of all learners' relative speeds.
    mean_step : steps at the last global mean, averaged over the learners, if they go at their own pace.
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
RoundLength = Callable[[Progress], int]
Rate = Callable[[Progress, float], float]
"""The learning rate of a step, from the progress and the rate that the optimizer was given."""


def never(progress: Progress) -> Scope | None:
    """No mean is ever due."""
    return None


def every(period_steps: int) -> Schedule:
    """A global mean every `period_steps` steps: t mod K = 0 (K-AVG, Algorithm 1)."""

    def due(progress: Progress) -> Scope | None:
        return GLOBAL if progress.step % period_steps == 0 else None

    return due


def hierarchical(local_period_steps: int, global_period_steps: int) -> Schedule:
    """Local means at the phases K1, 2 K1, ... of every global period K2 (Hier-AVG, Algorithm 1).

    The phase restarts at every global mean, so K2 need not be a multiple of K1; where both are due the global mean
    alone is taken.
    """

    def due(progress: Progress) -> Scope | None:
        phase = progress.step % global_period_steps
        if phase == 0:
            return GLOBAL
        return LOCAL if phase % local_period_steps == 0 else None

    return due


def in_rounds(length: RoundLength) -> Schedule:
    """A global mean whenever a round has lasted `length` steps, which may change from round to round."""

    def due(progress: Progress) -> Scope | None:
        return GLOBAL if progress.step - progress.round_step >= length(progress) else None

    return due


def cut_at_end(length: RoundLength, total_steps: int | None) -> RoundLength:
    """`length`, but the round in which the run ends ends with it, where its steps are known."""
    if total_steps is None:
        return length
    return lambda progress: min(length(progress), total_steps - progress.round_step)


def in_seconds(budget_s: float, total_steps: int | None = None) -> Schedule:
    """A global mean at the first step that finds `budget_s` passed since the last one (PR-SGD, after Algorithm 3).

    No learner takes more steps in a round than the mean one has left, where the run's are known.
    """

    def due(progress: Progress) -> Scope | None:
        steps = progress.step - progress.round_step
        is_over = total_steps is not None and steps >= total_steps - progress.mean_step
        return GLOBAL if is_over or progress.round_seconds >= budget_s else None

    return due


# -- how long a round lasts ---------------------------------------------------------------------------------------


def switched_length(switch_step: int, steps_after: int) -> RoundLength:
    """H = 1 until step `switch_step` is over, `steps_after` from then on (post-local SGD, Lin et al. 2018)."""
    return lambda progress: 1 if progress.round_step < switch_step else steps_after


def restart_length(num_learners: int) -> RoundLength:
    """K^s = ceil(s^(1/3) / N) steps in epoch s = 1, 2, ... (PR-SGD, Theorem 2)."""
    return lambda progress: _ceil_cube_root(progress.round + 1, num_learners**3)


def linear_length(first_steps: int, numerator: int, denominator: int) -> RoundLength:
    """τ_i = (1 + i α) τ_0 steps, rounded up, with α = numerator / denominator (LUPA-SGD, section 6)."""
    return lambda progress: -(-(denominator + progress.round * numerator) * first_steps // denominator)


def filling_length(first_steps: int, num_rounds: int, total_steps: int) -> RoundLength:
    """τ_i = (1 + i α) τ_0 with the α for which `num_rounds` of them sum to `total_steps` (LUPA-SGD, section 6).

    The ends of the rounds are rounded up rather than their lengths, which alone gives exactly that many rounds. Where
    even α = 0 overfills the run, the last round is cut by its end.
    """
    growth = max(0, total_steps - num_rounds * first_steps)

    def length(progress: Progress) -> int:
        i = progress.round
        # Σ_{j <= i} (1 + j α) τ_0, with α τ_0 = 2 growth / (E (E - 1))
        grown = -(-growth * i * (i + 1) // max(1, num_rounds * (num_rounds - 1)))
        return first_steps * (i + 1) + grown - progress.round_step

    return length


def loss_length(first_steps: int) -> RoundLength:
    """τ_i = ceil((F(x̄_0) / F(x̄_i))^(1/3)) τ_0, never below τ_0 (LUPA-SGD, eq. 11)."""

    def length(progress: Progress) -> int:
        first, last = progress.first_loss, progress.loss
        if first is None or last is None or not (0 < last < math.inf and 0 < first / last < math.inf):
            return first_steps
        return _ceil_cube_root(first, last) * first_steps

    return length


def listed_length(lengths: Sequence[int], learner: int, total_steps: int | None) -> RoundLength:
    """The learner's own of `lengths`, cut where the mean learner would go beyond the run's steps: it ends with them."""

    @functools.cache
    def of_at_most(most: int) -> int:
        return lengths[learner] if sum(lengths) <= most else _cut(lengths, most)[learner]

    if total_steps is None:
        return lambda progress: lengths[learner]
    return lambda progress: of_at_most(round((total_steps - progress.mean_step) * len(lengths)))


def _cut(lengths: Sequence[int], total: int) -> list[int]:
    """Return lengths that sum to `total`, which is less, in proportion to `lengths`; at least 1 each."""
    spare, rest = max(0, total - len(lengths)), sum(lengths) - len(lengths)
    shares = [divmod((length - 1) * spare, rest) for length in lengths]
    cut = [1 + steps for steps, _ in shares]
    by_remainder = sorted(range(len(cut)), key=lambda index: -shares[index][1])
    for index in by_remainder[: spare - sum(steps for steps, _ in shares)]:
        cut[index] += 1
    return cut


def speed_length(slowest_steps: int, total_steps: int | None) -> RoundLength:
    """I_i steps in proportion to the learner's speed, `slowest_steps` for the slowest (PR-SGD, before Algorithm 3).

    The round in which the mean learner would go beyond the run's steps is cut for all alike: it then does so by less
    than one.
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
    """Return the longest round of a run whose lengths depend on nothing but the round."""
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
    """γ^s = γ_0 N / s^(2/3) in epoch s = 1, 2, ... (PR-SGD, Theorem 2)."""
    return lambda progress, rate: rate * num_learners / (progress.round + 1) ** (2 / 3)


def inverse_time_rate(mu: float, shift: float) -> Rate:
    """η_t = 4 / (μ (t + a)), t = 0 at the first step (LUPA-SGD, Theorem 1), whatever the optimizer was given."""
    return lambda progress, rate: 4 / (mu * (progress.step - 1 + shift))
