"""Exceptions of the package: unusable input, learners with bad parameters, calls that do not match."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpcavg.utils.text import fold_numbers, printable


class InputError(ValueError):
    """A value from the user that cannot be used.

    Parameters
    ----------
    option : str
        The argument's name as Python spells it, for example ``"group_size"``; a variable of the shell in capitals.
    value : object
        The value that was given.
    allowed : str
        What is accepted, in a few words.

    Examples
    --------
    >>> from hpcavg import InputError, algorithms
    >>> try:
    ...     algorithms.k_avg(k=0)
    ... except InputError as error:
    ...     print(error)
    ...     print(error.as_option())
    k=0: must be an integer of at least 1
    --k 0: must be an integer of at least 1
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(option, value, allowed)
        self.option, self.value, self.allowed = option, value, allowed

    def __str__(self) -> str:
        return f"{self.option}={self.value!r}: must be {self.allowed}"

    def as_option(self) -> str:
        """Return the message with the name as the command line spells it, or as the shell spells a variable."""
        value, allowed = printable(self.value), printable(self.allowed, 2000)
        if self.option.isupper():
            return f"{self.option}={value}: must be {allowed}"
        return f"--{self.option.replace('_', '-')} {value}: must be {allowed}"


class UsageError(InputError):
    """A command line that cannot be parsed: an unknown option, a missing value."""

    def __init__(self, message: str) -> None:
        super().__init__("arguments", message, "what --help lists")
        self.args = (message,)

    def as_option(self) -> str:
        """Return the message."""
        return printable(self.value, 2000)


class SickLearnersError(RuntimeError):
    """A mean or a checkpoint is not taken because parameters are not finite.

    Parameters
    ----------
    learners : sequence of int
        The learners with such parameters.
    when : str
        The mean or checkpoint, such as ``"global average of step 32"``.
    of_how_many : int
        Number of learners that take part in it.
    tensor : str, optional
        The name of the first tensor that is not finite; empty if it is unknown.

    Examples
    --------
    >>> raise SickLearnersError([2], "global average of step 32", 4, "0.weight")
    Traceback (most recent call last):
    hpcavg.errors.SickLearnersError: learner 2 (1 of 4) with parameters ... (0.weight), at the global average of step 32
    """

    def __init__(self, learners: Sequence[int], when: str, of_how_many: int, tensor: str = "") -> None:
        self.learners = list(learners)
        who = f"{_listed(learners)} ({len(learners)} of {of_how_many})"
        which = f" ({tensor})" if tensor else ""
        super().__init__(f"{who} with parameters that are not finite{which}, at the {when}")


class MismatchError(RuntimeError):
    """Learners that met are in different calls or at different steps. Nothing has been averaged.

    Parameters
    ----------
    calls : mapping of int to str
        The call of every learner, by its index.
    """

    def __init__(self, calls: Mapping[int, str]) -> None:
        self.calls = dict(calls)
        learners: dict[str, list[int]] = {}
        for learner, call in self.calls.items():
            learners.setdefault(call, []).append(learner)
        who = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {fold_numbers(ranks)} in {call}" for call, ranks in learners.items()
        )
        super().__init__(f"calls that do not belong together: {who}; every learner makes the same calls in one order")


class CorruptionError(RuntimeError):
    """Learners that must hold the same bits hold different ones.

    Parameters
    ----------
    learners : sequence of int
        The learners that differ from the majority; all learners if `is_known` is false.
    is_known : bool
        Whether there is a majority.
    what : sequence of str
        The names of what differs.
    when : str
        The mean that had made it equal.

    Attributes
    ----------
    ranks : list of int
        The learners that differ from the majority; empty if there is none.
    """

    def __init__(self, learners: Sequence[int], is_known: bool, what: Sequence[str], when: str) -> None:
        self.ranks = list(learners) if is_known else []
        which = "other" if is_known else "different"
        unknown = "" if is_known else "; which of them are damaged cannot be told"
        super().__init__(f"{_listed(learners)} with {which} {' and '.join(what)} {when}{unknown}")


def _listed(learners: Sequence[int]) -> str:
    return f"learner{'s' * (len(learners) > 1)} {', '.join(map(str, learners))}"


def require_integer(option: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raise `InputError` unless `value` is an integer in ``minimum..maximum``. None: no upper bound."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        upper = "" if maximum is None else f" and at most {maximum}"
        raise InputError(option, value, f"an integer of at least {minimum}{upper}")


def require_number(option: str, value: object, holds: Callable[[float], bool], allowed: str) -> None:
    """Raise `InputError` unless `value` is a finite number for which `holds` is true; `allowed` describes them."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not holds(value):  # type: ignore[arg-type]
        raise InputError(option, value, allowed)


@contextmanager
def reading(option: str, path: object) -> Iterator[None]:
    """Turn an `OSError` on the folder `path` into an `InputError` of `option`."""
    try:
        yield
    except OSError as error:
        raise InputError(option, path, f"a folder that can be read ({reason(error)})") from error


def why(error: OSError) -> str:
    """Return the file's name, if known, and the `reason` of a failed operation on it."""
    return ": ".join(str(part) for part in (error.filename, reason(error)) if part)


def reason(error: Exception) -> str:
    """Return why a file could not be read or written, in a few words. HDF5 puts the errno into its text only."""
    found = re.search(r"errno = (\d+)", str(error))
    number = getattr(error, "errno", None) or (found and int(found[1]))
    return os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
