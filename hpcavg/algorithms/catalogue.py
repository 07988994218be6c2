"""What there is to say about every algorithm, once: the source of its help, its documentation and its option names."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from hpcavg.algorithms.rule import Rule

_P = ParamSpec("_P")

OPTIONS = {
    "variant": "what is averaged: parameters or gradients",
    "k": "steps between global means",
    "k1": "steps between local means",
    "k2": "steps between global means",
    "interval": "steps between global means",
    "switch_step": "last step that averages at every step",
    "local_steps": "steps of each learner between two means, as 9,9,9,3; auto goes by measured speed",
    "base_steps": "steps of the slowest learner between two means where local steps are auto",
    "epoch_seconds": "in their place: seconds between two means, in which each learner steps as often as it can",
    "tau": "steps between two means or exchanges; lupa also takes auto",
    "delay": "steps from the start of a mean to its merge, below tau",
    "xi": "share of the learner's own parameters in a blend, in [0, 1)",
    "mu": "PL constant of the learning rate 4/(mu (t + shift)); unset: the optimizer's own rate",
    "shift": "shift a of that rate; unset: the longest tau + 4",
    "tau0": "steps before the first mean, the shortest period",
    "growth": "what the period follows: linear or loss",
    "alpha": "ada-lupa: growth of the period per round, unset: 0.5; eamsgd: elasticity, unset: 0.9/P",
    "rounds": "number of periods that fill the run, in place of alpha",
    "beta": "slow momentum, in [0, 1)",
    "h": "steps between outer steps",
    "outer_lr": "learning rate of the outer optimizer",
    "outer_momentum": "Nesterov momentum of the outer optimizer, in [0, 1)",
    "n_push": "steps between updates sent to the server",
    "n_fetch": "steps between parameters taken from the server",
    "momentum": "momentum of sgd, in [0, 1); Nesterov's for eamsgd",
}
"""The arguments of all algorithms, by name."""


@dataclass(frozen=True)
class Text:
    """An algorithm in words.

    Attributes
    ----------
    source : paper and equation. when, who, how : the rule.
    sends : what a learner brings into means per step, in sizes M of the model. choose : when to choose it.
    """

    source: str
    when: str
    who: str
    how: str
    sends: str
    choose: str


_TEXTS = {
    "sgd": Text(
        source="baseline",
        when="never",
        who="nobody",
        how="the final model is the mean of learners that never met",
        sends="nothing",
        choose="on one learner, or to see what averaging is worth",
    ),
    "sync_sgd": Text(
        source="baseline of all five papers",
        when="every step",
        who="all",
        how="replace; gradients: the mean gradient, then the step",
        sends="M",
        choose="where the network is no bottleneck, and as the baseline",
    ),
    "one_shot": Text(
        source="Zinkevich et al. 2010; LUPA-SGD, Fig. 2",
        when="after the last step",
        who="all",
        how="replace",
        sends="M/T",
        choose="as the other end of the scale from sync_sgd",
    ),
    "k_avg": Text(
        source="K-AVG, Algorithm 1",
        when="t mod k = 0",
        who="all",
        how="replace",
        sends="M/k",
        choose="first: one number to tune",
    ),
    "hier_avg": Text(
        source="Hier-AVG, Algorithm 1",
        when="phase t mod k2: global at 0, local at multiples of k1",
        who="the local group, then all",
        how="replace",
        sends="M/k2 globally, about M/k1 locally",
        choose="where links inside a node are much faster than between nodes",
    ),
    "post_local_sgd": Text(
        source="Lin et al. 2018",
        when="every step up to switch_step, then (t - switch_step) mod k = 0",
        who="all",
        how="replace",
        sends="M, then M/k",
        choose="where averaging rarely from the start costs accuracy",
    ),
    "pr_sgd": Text(
        source="PR-SGD, Algorithm 1, eq. (2)",
        when="t mod interval = 0, before the step",
        who="all",
        how="replace, then step by the gradient taken before",
        sends="M/interval",
        choose="to follow the paper's analysis to the letter",
    ),
    "pr_sgd_time_varying": Text(
        source="PR-SGD, Algorithm 2, Theorem 2",
        when="after K^s = ceil(s^(1/3)/P) steps of epoch s",
        who="all",
        how="replace; the rate is the optimizer's times P/s^(2/3)",
        sends="M/K^s",
        choose="where the length of the run is not known beforehand",
    ),
    "pr_sgd_hetero": Text(
        source="PR-SGD, Algorithm 3",
        when="after I_i steps of learner i, or when epoch_seconds have passed",
        who="all, with equal weights",
        how="replace",
        sends="M/I_i",
        choose="where some learners are slower than others",
    ),
    "lupa": Text(
        source="LUPA-SGD, Algorithm 1, Table 1, Theorem 1",
        when="t mod tau = 0; auto: tau = T^(2/3)/(P b)^(1/3)",
        who="all",
        how="replace; with mu the rate is 4/(mu (t + shift))",
        sends="M/tau",
        choose="to have the period chosen by theory",
    ),
    "ada_lupa": Text(
        source="LUPA-SGD, section 6 and eq. (11), Theorem 2",
        when="periods (1 + i alpha) tau0, or ceil((F_0/F_i)^(1/3)) tau0 by the loss F",
        who="all",
        how="replace; with mu the rate is 4/(mu (t + shift))",
        sends="M/tau_i",
        choose="to communicate less as the run goes on",
    ),
    "dasgd": Text(
        source="DaSGD, eq. (4), appendix A.2",
        when="started at t mod tau = 0, merged delay steps later",
        who="all",
        how="x = xi x + (1 - xi) mean",
        sends="M/tau, hidden behind computation",
        choose="where a mean takes no longer than delay steps: it then costs nothing",
    ),
    "slowmo": Text(
        source="Wang et al. 2020, Algorithm 1",
        when="t mod k = 0",
        who="all",
        how="u = beta u + (anchor - mean)/lr, x = anchor - outer_lr lr u",
        sends="M/k",
        choose="to win back accuracy that a long period cost",
    ),
    "diloco": Text(
        source="Douillard et al. 2023, Algorithm 1",
        when="t mod h = 0",
        who="all",
        how="Nesterov SGD on anchor - mean",
        sends="M/h",
        choose="with Adam and very long periods, over slow links",
    ),
    "downpour": Text(
        source="Dean et al. 2012; K-AVG, section 4.1",
        when="pushes at t mod n_push = 0, fetches at t mod n_fetch = 0",
        who="each learner alone with the server ranks",
        how="centre += sum of the learner's updates; x = centre",
        sends="M/n_push + M/n_fetch",
        choose="as the asynchronous baseline",
    ),
    "eamsgd": Text(
        source="Zhang, Choromanska, LeCun 2015; K-AVG, section 4.1",
        when="t mod tau = 0",
        who="each learner alone with the server ranks",
        how="e = alpha (x - centre); x -= e, centre += e",
        sends="2 M/tau",
        choose="as the asynchronous baseline that lets learners explore",
    ),
}


@dataclass(frozen=True)
class Description:
    """One line of the table of algorithms: the constructor's name, its text, its arguments with their defaults."""

    name: str
    text: Text
    options: dict[str, Any]

    def signature(self) -> str:
        """Return the options with their defaults, for example ``k1=4, k2=32``."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    def flags(self) -> str:
        """Return the same as command-line options; those without a default in brackets."""
        flags = ((f"--{name.replace('_', '-')}", value) for name, value in self.options.items())
        return " ".join(f"[{flag}]" if value is None else f"{flag} {value}" for flag, value in flags)


DESCRIPTIONS: dict[str, Description] = {}
ALGORITHMS: dict[str, Callable[..., Rule]] = {}


def algorithm(make: Callable[_P, Rule]) -> Callable[_P, Rule]:
    """Enter a constructor into the catalogue; its rules carry its name and the arguments they were made with."""
    name = make.__name__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def constructor(*args: _P.args, **kwargs: _P.kwargs) -> Rule:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dataclasses.replace(make(*args, **kwargs), name=name, options=dict(bound.arguments))

    defaults = {option: parameter.default for option, parameter in signature.parameters.items()}
    DESCRIPTIONS[name] = Description(name, _TEXTS[name], defaults)
    ALGORITHMS[name] = constructor
    return constructor


def option_names(name: str) -> tuple[str, ...]:
    """Return the arguments that algorithm `name` takes."""
    return tuple(DESCRIPTIONS[name].options)


def describe(name: str | None = None) -> str:
    """Return what there is to say about algorithm `name`, or about all of them, as text for a terminal."""
    chosen = DESCRIPTIONS.values() if name is None else [DESCRIPTIONS[name]]
    wrap = functools.partial(textwrap.fill, width=100, subsequent_indent="      ")
    lines = []
    for entry in chosen:
        lines.append(wrap(f"  {entry.name.replace('_', '-')} {entry.flags()}".rstrip()))
        text = entry.text
        lines.append(wrap(f"      {text.source}. When: {text.when}. Who: {text.who}. How: {text.how}."))
        lines.append(wrap(f"      Sends per step: {text.sends}. Choose it {text.choose}."))
    return "\n".join(lines)


def option_help(option: str) -> str:
    """Return the meaning of an option and which algorithms take it, with their defaults."""
    takers = [
        entry.name.replace("_", "-")
        + ("" if entry.options[option] is None else f" {str(entry.options[option]).replace('_', '-')}")
        for entry in DESCRIPTIONS.values()
        if option in entry.options
    ]
    return f"{OPTIONS[option]} [{', '.join(takers)}]"


def markdown_table() -> str:
    """Return the table of docs/algorithms.md."""
    heads = ("algorithm", "source", "when", "who", "how", "options", "sends per step", "choose it")
    rows = [heads, ("---",) * len(heads)]
    for entry in DESCRIPTIONS.values():
        options = ", ".join(f"`{name}={value}`" for name, value in entry.options.items()) or "none"
        text = entry.text
        rows.append((f"`{entry.name}`", text.source, text.when, text.who, text.how, options, text.sends, text.choose))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
