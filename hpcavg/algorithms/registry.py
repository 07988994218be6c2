"""The registry of algorithms: help, tables and command-line options are made from it. Light to import.

`algorithm` registers a constructor together with all that is said of it. Its signature gives the names, types and
defaults of its options.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

from hpcavg.algorithms.rule import Rule
from hpcavg.errors import InputError

_P = ParamSpec("_P")


@dataclass(frozen=True)
class Description:
    """One algorithm in words: a row of the table of algorithms.

    Attributes
    ----------
    name : name of the constructor.
    options : the constructor's arguments and their defaults.
    types : the type of each argument, as annotated.
    helps : one line of text for each argument that the algorithm describes itself.
    source : paper and equation.
    when : the steps at which a mean is due.
    who : the learners that it is taken over.
    how : how it is merged into the parameters.
    sends : what a learner brings into means per step, in sizes M of the model.
    choose : when to choose the algorithm.
    """

    name: str
    options: dict[str, Any]
    types: dict[str, Any]
    helps: Mapping[str, str]
    source: str
    when: str
    who: str
    how: str
    sends: str
    choose: str

    @property
    def label(self) -> str:
        """The name as the command line spells it."""
        return self.name.replace("_", "-")

    def flags(self) -> str:
        """Return the command-line options with their defaults; those without a default stand in brackets."""
        flags = ((f"--{name.replace('_', '-')}", value) for name, value in self.options.items())
        return " ".join(f"[{flag}]" if value is None else f"{flag} {value}" for flag, value in flags)


DESCRIPTIONS: dict[str, Description] = {}
ALGORITHMS: dict[str, Callable[..., Rule]] = {}


def algorithm(
    options: Mapping[str, str] | None = None, **words: str
) -> Callable[[Callable[_P, Rule]], Callable[_P, Rule]]:
    """Register the constructor below; its rules carry its name and their arguments.

    Parameters
    ----------
    options : one line of text for each argument. An argument that an earlier algorithm describes needs none.
    words : source, when, who, how, sends and choose, as in `Description`.
    """

    def register(make: Callable[_P, Rule]) -> Callable[_P, Rule]:
        name, signature, types = make.__name__, inspect.signature(make), typing.get_type_hints(make)

        @functools.wraps(make)
        def constructor(*args: _P.args, **kwargs: _P.kwargs) -> Rule:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return dataclasses.replace(make(*args, **kwargs), name=name, options=dict(bound.arguments))

        defaults = {option: parameter.default for option, parameter in signature.parameters.items()}
        DESCRIPTIONS[name] = Description(name, defaults, types, options or {}, **words)
        ALGORITHMS[name] = constructor
        return constructor

    return register


def build(name: str, options: Mapping[str, Any]) -> Rule:
    """Return the rule of an algorithm.

    Parameters
    ----------
    name : a name in `ALGORITHMS`.
    options : arguments of its constructor.

    Raises
    ------
    InputError
        If the algorithm does not take one of the options, or not with this value.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.build("hier_avg", {"k1": 2}).options
    {'k1': 2, 'k2': 32}
    """
    accepted = option_names(name)
    for option, value in options.items():
        if option not in accepted:
            takes = f"only {', '.join(accepted)}" if accepted else "no such option"
            raise InputError(option, value, f"left out: {name} takes {takes}")
    return ALGORITHMS[name](**options)


def option_names(name: str) -> tuple[str, ...]:
    """Return the arguments that algorithm `name` takes."""
    return tuple(DESCRIPTIONS[name].options)


def all_option_names() -> list[str]:
    """Return the arguments of all algorithms, each once, in the order of the algorithms."""
    return list(dict.fromkeys(option for name in ALGORITHMS for option in option_names(name)))


def option_type(option: str) -> Any:
    """Return the union of the types of an argument in all algorithms that take it."""
    union, *others = (entry.types[option] for entry in _takers(option))
    for kind in others:
        union = union | kind
    return union


def option_help(option: str) -> str:
    """Return what an argument means and which algorithms take it, with their defaults."""
    defaults = ((entry.label, entry.options[option]) for entry in _takers(option))
    takers = [label if value is None else f"{label} {str(value).replace('_', '-')}" for label, value in defaults]
    return f"{option_text(option)} [{', '.join(takers)}]"


def option_text(option: str) -> str:
    """Return what an argument means: one text, or one for each algorithm that has its own."""
    texts = {entry.label: entry.helps[option] for entry in _takers(option) if option in entry.helps}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{label}: {text}" for label, text in texts.items())


def _takers(option: str) -> list[Description]:
    return [entry for entry in DESCRIPTIONS.values() if option in entry.options]


def describe(name: str | None = None) -> str:
    """Return the description of algorithm `name`, or of all algorithms, as text for a terminal.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> print(algorithms.describe("k_avg"))
      k-avg --k 8
          K-AVG, Algorithm 1. When: t mod k = 0. Who: all. How: replace.
          Sends per step: M/k. Choose it first: one number to tune.
    """
    chosen = DESCRIPTIONS.values() if name is None else [DESCRIPTIONS[name]]
    wrap = functools.partial(textwrap.fill, width=100, subsequent_indent="      ")
    lines = []
    for entry in chosen:
        lines.append(wrap(f"  {entry.label} {entry.flags()}".rstrip()))
        lines.append(wrap(f"      {entry.source}. When: {entry.when}. Who: {entry.who}. How: {entry.how}."))
        lines.append(wrap(f"      Sends per step: {entry.sends}. Choose it {entry.choose}."))
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the table of docs/algorithms.md."""
    heads = ("algorithm", "source", "when", "who", "how", "options", "sends per step", "choose it")
    rows = [heads, ("---",) * len(heads)]
    for entry in DESCRIPTIONS.values():
        options = ", ".join(f"`{name}={value}`" for name, value in entry.options.items()) or "none"
        words = (entry.source, entry.when, entry.who, entry.how, options, entry.sends, entry.choose)
        rows.append((f"`{entry.name}`", *words))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
