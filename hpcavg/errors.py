"""The exceptions of the package, and checks of values that users give."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from hpcavg.utils.text import fold_numbers, printable


class InputError(ValueError):
    """A value that the user gave cannot be used.

    Parameters
    ----------
    option : str
        The argument's name in Python, such as ``"group_size"``.
    value : object
        The value.
    allowed : str
        The allowed values, in a few words.

    Examples
    --------
    >>> from hpcavg import InputError
    >>> error = InputError("group_size", 3, "a divisor of 4")
    >>> print(error)
    group_size=3: must be a divisor of 4
    >>> print(error.as_option())
    --group-size 3: must be a divisor of 4
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(option, value, allowed)
        self.option, self.value, self.allowed = option, value, allowed

    def __str__(self) -> str:
        return f"{self.option}={self.value!r}: must be {self.allowed}"

    def as_option(self) -> str:
        """Return the message with the name of the command-line option, or of the environment variable."""
        value, allowed = printable(self.value), printable(self.allowed, 2000)
        if self.option.isupper():
            return f"{self.option}={value}: must be {allowed}"
        return f"--{self.option.replace('_', '-')} {value}: must be {allowed}"


class UsageError(InputError):
    """A command line cannot be parsed: an unknown option, a missing value."""

    def __init__(self, message: str) -> None:
        super().__init__("arguments", message, "what --help lists")
        self.args = (message,)

    def as_option(self) -> str:
        """Return the message."""
        return printable(self.value, 2000)


class SickLearnersError(RuntimeError):
    """A mean or checkpoint is not taken, because learners are sick: their parameters are not finite.

    Parameters
    ----------
    learners : sequence of int
        The sick learners, as ranks in the topology's `learner_ranks`.
    when : str
        The mean or checkpoint, such as ``"global average of step 32"``.
    of_how_many : int
        The number of learners that take part.
    tensor : str
        The name of the first tensor that is not finite; empty if it is unknown.

    Attributes
    ----------
    learners : the sick learners.

    Examples
    --------
    >>> from hpcavg.errors import SickLearnersError
    >>> print(SickLearnersError([2], "global average of step 32", 4, "weight"))
    learner 2 (1 of 4) with parameters that are not finite (weight), at the global average of step 32
    """

    def __init__(self, learners: Sequence[int], when: str, of_how_many: int, tensor: str = "") -> None:
        self.learners = list(learners)
        who = f"{_listed(learners)} ({len(learners)} of {of_how_many})"
        which = f" ({tensor})" if tensor else ""
        super().__init__(f"{who} with parameters that are not finite{which}, at the {when}")


class MismatchError(RuntimeError):
    """Learners met in different calls or at different steps. Nothing was averaged.

    Parameters
    ----------
    calls : mapping
        The call of each learner, by its rank in the topology's `learner_ranks`.

    Attributes
    ----------
    calls : the calls.

    Examples
    --------
    >>> from hpcavg.errors import MismatchError
    >>> error = MismatchError({0: "averager.finish() after step 11", 1: "global average of step 12"})
    >>> print(str(error).split("; every")[0])
    calls that do not belong together: rank 0 in averager.finish() after step 11; rank 1 in global average of step 12
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
        The learners that differ from the majority; all of them if there is none.
    is_known : bool
        Whether there is a majority.
    what : sequence of str
        The names of the parts that differ, such as ``"parameters"``.
    when : str
        The event after which they were compared, such as ``"at step 8"``.

    Attributes
    ----------
    ranks : the learners that differ from the majority; empty if there is none.

    Examples
    --------
    >>> from hpcavg.errors import CorruptionError
    >>> print(CorruptionError([3], True, ["parameters"], "at step 8"))
    learner 3 with other parameters at step 8
    """

    def __init__(self, learners: Sequence[int], is_known: bool, what: Sequence[str], when: str) -> None:
        self.ranks = list(learners) if is_known else []
        which = "other" if is_known else "different"
        unknown = "" if is_known else "; which of them are damaged cannot be told"
        super().__init__(f"{_listed(learners)} with {which} {' and '.join(what)} {when}{unknown}")


def _listed(learners: Sequence[int]) -> str:
    return f"learner{'s' * (len(learners) > 1)} {', '.join(map(str, learners))}"


def require_integer(option: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raise `InputError` unless `value` is an integer from `minimum` to `maximum`.

    Parameters
    ----------
    option : the argument's name.
    value : its value.
    minimum : the smallest allowed value.
    maximum : the largest allowed value; None: there is none.

    Examples
    --------
    >>> from hpcavg.errors import require_integer
    >>> require_integer("k", 8, minimum=1)
    >>> require_integer("k", 0, minimum=1)
    Traceback (most recent call last):
    hpcavg.errors.InputError: k=0: must be an integer of at least 1
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        upper = "" if maximum is None else f" and at most {maximum}"
        raise InputError(option, value, f"an integer of at least {minimum}{upper}")


def require_number(option: str, value: object, holds: Callable[[float], bool], allowed: str) -> None:
    """Raise `InputError` unless `value` is a finite number for which `holds` is true.

    Parameters
    ----------
    option : the argument's name.
    value : its value.
    holds : returns whether a finite number is allowed.
    allowed : the allowed values, in a few words.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not holds(value):  # type: ignore[arg-type]
        raise InputError(option, value, allowed)


@contextmanager
def reading(option: str, path: object) -> Iterator[None]:
    """Turn an `OSError` in the block into an `InputError` for `option`, whose value is the folder `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(option, path, f"a folder that can be read ({reason(error)})") from error


def why(error: OSError) -> str:
    """Return why a file operation failed: the file's name, if known, and the `reason`."""
    return ": ".join(str(part) for part in (error.filename, reason(error)) if part)


def reason(error: Exception) -> str:
    """Return why a file could not be read or written, in a few words. HDF5 gives the errno in its text only."""
    found = re.search(r"errno = (\d+)", str(error))
    number = getattr(error, "errno", None) or (found and int(found[1]))
    return os.strerror(number) if number else " ".join(str(error).split()) or type(error).__name__
