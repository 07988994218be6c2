"""LUPA-SGD: periods that theory chooses from the length of the run, or that grow along it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import (
    Rate,
    RoundLength,
    Run,
    Schedule,
    cut_at_end,
    filling_length,
    in_rounds,
    inverse_time_rate,
    linear_length,
    longest_round,
    loss_length,
)
from hpcavg.errors import InputError, require_integer, require_number

DEFAULT_GROWTH = 0.5
# Smallest mu and shift: float32 must hold the learning rate 4/(mu (t + shift)).
_LEAST = 1e-15


@algorithm(
    options={
        "tau": "steps between two means or exchanges; lupa also takes auto",
        "mu": "PL constant of the learning rate 4/(mu (t + shift)); unset: the optimizer's own rate",
        "shift": "shift a of that rate; unset: the longest tau + 4",
    },
    source="LUPA-SGD, Algorithm 1, Table 1, Theorem 1",
    when="t mod tau = 0; auto: tau = T^(2/3)/(P b)^(1/3)",
    who="all",
    how="replace; with mu the rate is 4/(mu (t + shift))",
    sends="M/tau",
    choose="to have the period chosen by theory",
)
def lupa(tau: int | Literal["auto"] = 16, mu: float | None = None, shift: float | None = None) -> Rule:
    """Take a global mean every `tau` steps (LUPA-SGD, Algorithm 1).

    Parameters
    ----------
    tau : steps between global means, at least 1. ``"auto"``: T^(2/3)/(P b)^(1/3), rounded, for a run of T steps of P
        learners with batch size b.
    mu : gives step t = 0, 1, ... the learning rate 4/(mu (t + shift)) (Theorem 1). None: the optimizer's own rate.
    shift : the shift a of that rate. None: tau + 4.

    Raises
    ------
    InputError
        If an argument is out of range, or `shift` is given without `mu`.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.lupa("auto").options
    {'tau': 'auto', 'mu': None, 'shift': None}
    """
    if tau != "auto" and (not isinstance(tau, int) or isinstance(tau, bool) or tau < 1):
        raise InputError("tau", tau, "an integer of at least 1, or auto")
    _check_rate(mu, shift)

    def period(run: Run) -> int:
        return _automatic_period(run) if tau == "auto" else tau

    def when(run: Run) -> Schedule:
        steps = period(run)
        return in_rounds(lambda progress: steps)

    return Rule(when, rate=_inverse_time(mu, shift, period))


def _automatic_period(run: Run) -> int:
    why = "because lupa's tau is auto"
    if run.total_steps is None:
        raise InputError("total_steps", None, f"the steps of the run, {why}")
    if run.batch_size is None:
        raise InputError("batch_size", None, f"the samples of a step, {why}")
    return max(1, round(run.total_steps ** (2 / 3) / (run.num_learners * run.batch_size) ** (1 / 3)))


@algorithm(
    options={
        "tau0": "steps before the first mean, the shortest period",
        "growth": "what the period follows: linear or loss",
        "alpha": "growth of the period per round, unset: 0.5",
        "rounds": "number of periods that fill the run, in place of alpha",
    },
    source="LUPA-SGD, section 6 and eq. (11), Theorem 2",
    when="periods (1 + i alpha) tau0, or ceil((F_0/F_i)^(1/3)) tau0 by the loss F",
    who="all",
    how="replace; with mu the rate is 4/(mu (t + shift))",
    sends="M/tau_i",
    choose="to communicate less as the run goes on",
)
def ada_lupa(
    tau0: int = 8,
    growth: Literal["linear", "loss"] = "linear",
    alpha: float | None = None,
    rounds: int | None = None,
    mu: float | None = None,
    shift: float | None = None,
) -> Rule:
    """Take global means at growing periods (ADA-LUPA-SGD, section 6 and eq. 11).

    The end of the run cuts the last period.

    Parameters
    ----------
    tau0 : steps before the first mean, at least 1.
    growth : ``"linear"``: τ_i = (1 + i alpha) tau0, rounded up. ``"loss"``: τ_i = ceil((F_0/F_i)^(1/3)) tau0. F_i is
        the mean training loss of all learners over the round before, F_0 that of the first round.
    alpha : growth per round, at least 0. None: 0.5.
    rounds : instead of `alpha`: the number of periods that fill the run.
    mu : gives step t = 0, 1, ... the learning rate 4/(mu (t + shift)) (Theorem 2). None: the optimizer's own rate.
    shift : the shift a of that rate. None: max τ_i + 4.

    Raises
    ------
    InputError
        If an argument is out of range, or is given together with one that excludes it.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.ada_lupa(4, growth="loss").agrees_on
    'loss'
    """
    require_integer("tau0", tau0, 1)
    if growth not in ("linear", "loss"):
        raise InputError("growth", growth, "linear or loss")
    _check_rate(mu, shift)
    if growth == "loss":
        for option, value in (("alpha", alpha), ("rounds", rounds)):
            if value is not None:
                raise InputError(option, value, "unset where growth is loss")
        if mu is not None and shift is None:
            raise InputError("shift", None, "given where growth is loss: the longest period is not known beforehand")

        def when(run: Run) -> Schedule:
            return in_rounds(cut_at_end(loss_length(tau0), run.total_steps))

        return Rule(when, agrees_on="loss", rate=_inverse_time(mu, shift, lambda run: tau0))
    if rounds is not None:
        require_integer("rounds", rounds, 1)
        if alpha is not None:
            raise InputError("rounds", rounds, f"unset where alpha = {alpha}")
    elif alpha is not None:
        require_number("alpha", alpha, lambda a: a >= 0, "a number of at least 0")
    # The decimal that was written, not the binary number nearest to it: (1 + 1.1) 10 is 21.
    ratio = Fraction(str(DEFAULT_GROWTH if alpha is None else alpha))

    def length(run: Run) -> RoundLength:
        if rounds is None:
            return linear_length(tau0, ratio.numerator, ratio.denominator)
        return filling_length(tau0, rounds, _steps_filled_by(rounds, tau0, run))

    def when_growing(run: Run) -> Schedule:
        return in_rounds(cut_at_end(length(run), run.total_steps))

    def longest(run: Run) -> int:
        if run.total_steps is None:
            raise InputError("total_steps", None, "the steps of the run, or give shift, because mu sets the rate")
        return longest_round(length(run), run.total_steps)

    return Rule(when_growing, rate=_inverse_time(mu, shift, longest))


def _steps_filled_by(rounds: int, tau0: int, run: Run) -> int:
    """Return the run's steps; raise if no growth divides them into `rounds` periods of at least `tau0`."""
    total_steps = run.total_steps
    if total_steps is None:
        raise InputError("total_steps", None, "the steps of the run, because ada_lupa's rounds fill it")
    most = -(-total_steps // tau0)
    fewest = min(2, most)
    if not fewest <= rounds <= most:
        raise InputError("rounds", rounds, f"{fewest} to {most}, with {total_steps} steps and tau0 = {tau0}")
    return total_steps


def _check_rate(mu: float | None, shift: float | None) -> None:
    if mu is not None:
        require_number("mu", mu, lambda m: m >= _LEAST, f"a number of at least {_LEAST:g}")
    if shift is not None:
        require_number("shift", shift, lambda a: a >= _LEAST, f"a number of at least {_LEAST:g}")
        if mu is None:
            raise InputError("shift", shift, "unset where mu is")


def _inverse_time(mu: float | None, shift: float | None, longest: Callable[[Run], int]) -> Callable[[Run], Rate] | None:
    """Return what makes the rate 4/(μ (t + a)) of a run; None without μ. If `shift` is None, a is `longest` + 4."""
    if mu is None:
        return None
    return lambda run: inverse_time_rate(mu, longest(run) + 4 if shift is None else shift)
