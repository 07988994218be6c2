"""The algorithms by name: each a short recipe of WHEN, WHO and HOW. Light to import: no torch, no MPI.

Every constructor returns a `Rule` for `hpcavg.Averager` and raises `InputError` where an argument cannot be used.
`describe` tells all of them, or one, in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from hpcavg.algorithms.catalogue import ALGORITHMS, algorithm, describe, option_names
from hpcavg.algorithms.merge import Blend, Merge, OuterMomentum, replace
from hpcavg.algorithms.rule import Rule, ServerExchange, always
from hpcavg.algorithms.schedule import (
    Rate,
    RoundLength,
    Run,
    Schedule,
    cut_at_end,
    every,
    filling_length,
    hierarchical,
    in_rounds,
    in_seconds,
    inverse_time_rate,
    linear_length,
    listed_length,
    longest_round,
    loss_length,
    never,
    restart_length,
    restart_rate,
    speed_length,
    switched_length,
)
from hpcavg.errors import InputError, require_integer, require_number

__all__ = ["ALGORITHMS", "all_option_names", "build", "describe", "option_names", *ALGORITHMS]

DEFAULT_GROWTH = 0.5
# Of factors of a learning rate below 1e30: float32 must hold what becomes of it.
_LEAST, _MOST = 1e-15, 1e8

# -- baselines ----------------------------------------------------------------------------------------------------


@algorithm
def sgd() -> Rule:
    """Learners that never meet: plain SGD on every learner; their mean is the final model."""
    return Rule(always(never))


@algorithm
def sync_sgd(variant: Literal["parameters", "gradients"] = "parameters") -> Rule:
    """A global mean at every step, of the parameters after the step or of the gradients before it.

    For SGD, with or without momentum, both are the same up to rounding; for Adam `gradients` is the usual baseline.
    """
    if variant not in ("parameters", "gradients"):
        raise InputError("variant", variant, "parameters or gradients")
    return Rule(always(every(1)), averages=variant, before_step=variant == "gradients")


@algorithm
def one_shot() -> Rule:
    """No mean until the end of the run (Zinkevich et al. 2010)."""
    return Rule(always(never))


# -- means at fixed periods ---------------------------------------------------------------------------------------


@algorithm
def k_avg(k: int = 8) -> Rule:
    """A global mean every `k` steps (K-AVG, Algorithm 1)."""
    require_integer("k", k, 1)
    return Rule(always(every(k)))


@algorithm
def hier_avg(k1: int = 4, k2: int = 32) -> Rule:
    """A mean over the local group every `k1` steps, over all learners every `k2` (Hier-AVG, Algorithm 1)."""
    require_integer("k2", k2, 1)
    require_integer("k1", k1, 1)
    if k1 > k2:
        raise InputError("k1", k1, f"an integer of at least 1 and at most k2 = {k2}")
    return Rule(always(hierarchical(k1, k2)))


@algorithm
def post_local_sgd(switch_step: int = 100, k: int = 8) -> Rule:
    """`sync_sgd` up to step `switch_step`, then a global mean every `k` steps after it (Lin et al. 2018).

    Means are due at 1, 2, ..., switch_step, switch_step + k, switch_step + 2 k, ... Torch's ``PeriodicModelAverager``
    takes the same ones with ``period=k`` and ``warmup_steps = switch_step - 1``: it looks before it counts, so its
    first mean comes one step after its warm-up.
    """
    require_integer("switch_step", switch_step, 0)
    require_integer("k", k, 1)
    return Rule(always(in_rounds(switched_length(switch_step, k))))


# -- restarted rounds ---------------------------------------------------------------------------------------------


@algorithm
def pr_sgd(interval: int = 8) -> Rule:
    """Every `interval` steps the global mean, then the step by the learner's own gradient (PR-SGD, Algorithm 1, eq. 2).

    The gradient is the one taken at the learner's own parameters, before they were replaced by the mean; right after
    the step the learners differ again.
    """
    require_integer("interval", interval, 1)
    return Rule(always(every(interval)), before_step=True)


@algorithm
def pr_sgd_time_varying() -> Rule:
    """Epochs s = 1, 2, ... of ceil(s^(1/3)/P) steps at P/s^(2/3) times the optimizer's rate (PR-SGD, Algorithm 2)."""
    return Rule(
        lambda run: in_rounds(restart_length(run.num_learners)),
        rate=lambda run: restart_rate(run.num_learners),
    )


@algorithm
def pr_sgd_hetero(
    local_steps: Sequence[int] | Literal["auto"] = "auto",
    base_steps: int = 8,
    epoch_seconds: float | None = None,
) -> Rule:
    """Rounds in which every learner takes as many steps as suit its speed (PR-SGD, Algorithm 3).

    local_steps : I_i of every learner; or ``"auto"``: every learner takes `base_steps` in the first round, from then on
        the slowest does, and the others more in proportion to the speed they showed.
    epoch_seconds : in place of `local_steps`: a learner steps until so much time has passed, at least once.

    The steps of a run are those of the mean learner; the last round is cut to end with them.
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


# -- periods that follow the run ----------------------------------------------------------------------------------


@algorithm
def lupa(tau: int | Literal["auto"] = 16, mu: float | None = None, shift: float | None = None) -> Rule:
    """A global mean every `tau` steps (LUPA-SGD, Algorithm 1).

    tau : ``"auto"`` takes T^(2/3)/(P b)^(1/3), rounded, from the run's steps T and batch size b.
    mu, shift : give step t = 0, 1, ... the learning rate 4/(mu (t + shift)) (Theorem 1); `shift` is tau + 4 if unset.
    """
    if tau != "auto":
        _require_period("tau", tau, "an integer of at least 1, or auto")
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


@algorithm
def ada_lupa(
    tau0: int = 8,
    growth: Literal["linear", "loss"] = "linear",
    alpha: float | None = None,
    rounds: int | None = None,
    mu: float | None = None,
    shift: float | None = None,
) -> Rule:
    """Global means at growing periods; the last is cut by the end of the run (ADA-LUPA-SGD, section 6 and eq. 11).

    growth : ``"linear"``: τ_i = (1 + i alpha) tau0, rounded up. ``"loss"``: τ_i = ceil((F_0/F_i)^(1/3)) tau0, where F_i
        is the mean training loss of all learners over the round before, and F_0 over the first.
    alpha : growth per round, 0.5 if unset. rounds : in place of `alpha`: the number of periods that fill the run.
    mu, shift : the learning rate 4/(mu (t + shift)) of Theorem 2; `shift` is max τ_i + 4 if unset.
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
    """Return the run's steps; raise where no growth makes `rounds` periods of at least `tau0` of them."""
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
    """Return what makes the rate 4/(μ (t + a)) for a run, None without μ; a is the longest period + 4 if unset."""
    if mu is None:
        return None
    return lambda run: inverse_time_rate(mu, longest(run) + 4 if shift is None else shift)


# -- means that are not simply taken ------------------------------------------------------------------------------


@algorithm
def dasgd(tau: int = 4, delay: int = 2, xi: float = 0.25) -> Rule:
    """Every `tau` steps a mean of the parameters starts, and is blended in `delay` steps later (DaSGD, eq. 4).

    delay : 0 waits for the mean; at most tau - 1. xi : the share of the learner's own parameters, in [0, 1).
    """
    _require_period("tau", tau, "an integer of at least 1")
    is_integer = isinstance(delay, int) and not isinstance(delay, bool)
    if not is_integer or not 0 <= delay < tau:
        raise InputError("delay", delay, f"an integer of at least 0 and below tau = {tau}")
    require_number("xi", xi, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
    how: Merge = Blend(xi) if xi else replace
    return Rule(always(every(tau)), how=how, how_buffers=how, delay_steps=delay)


@algorithm
def slowmo(k: int = 8, beta: float = 0.5, outer_lr: float = 1.0) -> Rule:
    """Every `k` steps a step of slow momentum along the way the mean has gone (SlowMo, Wang et al. 2020)."""
    require_integer("k", k, 1)
    require_number("beta", beta, lambda b: 0 <= b < 1, "a number of at least 0 and below 1")
    require_number("outer_lr", outer_lr, lambda a: 0 < a < _MOST, f"a positive number below {_MOST:g}")
    return Rule(always(every(k)), how=OuterMomentum(outer_lr, beta, nesterov=False, per_rate=True))


@algorithm
def diloco(h: int = 16, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> Rule:
    """Every `h` steps a step of Nesterov SGD along the way the mean has gone (DiLoCo, Douillard et al. 2023)."""
    require_integer("h", h, 1)
    require_number("outer_lr", outer_lr, lambda a: 0 < a < _MOST, f"a positive number below {_MOST:g}")
    require_number("outer_momentum", outer_momentum, lambda m: 0 <= m < 1, "a number of at least 0 and below 1")
    return Rule(always(every(h)), how=OuterMomentum(outer_lr, outer_momentum, nesterov=True, per_rate=False))


# -- asynchronous baselines: a parameter server -------------------------------------------------------------------


@algorithm
def downpour(n_push: int = 4, n_fetch: int = 4) -> Rule:
    """Learners send the sum of their updates every `n_push` steps and take the centre every `n_fetch` (Downpour)."""
    require_integer("n_push", n_push, 1)
    require_integer("n_fetch", n_fetch, 1)
    return Rule(always(never), server=ServerExchange(n_push, n_fetch))


@algorithm
def eamsgd(tau: int = 4, alpha: float | None = None, momentum: float = 0.9) -> Rule:
    """Every `tau` steps learner and centre are drawn together by `alpha` of their difference (EAMSGD).

    alpha : 0.9/P if unset. momentum : of the local Nesterov SGD; the averager sets it in the optimizer, which must be
        ``torch.optim.SGD``. 0 gives EASGD.
    """
    _require_period("tau", tau, "an integer of at least 1")
    if alpha is not None:
        require_number("alpha", alpha, lambda a: 0 < a < 1, "a number above 0 and below 1")
    require_number("momentum", momentum, lambda m: 0 <= m < 1, "a number of at least 0 and below 1")
    exchange = ServerExchange(tau, tau, lambda num_learners: 0.9 / num_learners if alpha is None else alpha)
    return Rule(always(never), server=exchange, optimizer={"momentum": momentum, "nesterov": momentum > 0})


def _require_period(option: str, value: object, allowed: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(option, value, allowed)


# -- by name ------------------------------------------------------------------------------------------------------


def all_option_names() -> list[str]:
    """Return the arguments of all algorithms."""
    return sorted({option for name in ALGORITHMS for option in option_names(name)})


def build(name: str, options: dict[str, Any]) -> Rule:
    """Return the rule of algorithm `name`; `options` it does not take are refused by name."""
    accepted = option_names(name)
    for option, value in options.items():
        if option not in accepted:
            takes = f"only {', '.join(accepted)}" if accepted else "no such option"
            raise InputError(option, value, f"left out: {name} takes {takes}")
    return ALGORITHMS[name](**options)
