"""Whether saved values have the form of those that they replace: another program, or version, may have written them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hpcavg.errors import InputError


def check_form(own: Any, given: Any) -> None:
    """Raise an exception that names the key of `own` that `given` lacks, or holds another kind of value under.

    None stands for what is not known yet, and goes with all kinds.
    """
    if isinstance(own, Mapping):
        for name, value in own.items():
            if value is not None and given[name] is not None:
                try:
                    check_form(value, given[name])
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from None
    elif isinstance(own, (int, float, str, Tensor)):
        kind = (int, float) if isinstance(own, (int, float)) else type(own)
        if not isinstance(given, kind):
            raise TypeError(f"a {type(given).__name__}")
    elif type(own) is not type(given) or len(own) != len(given):
        raise TypeError(f"a {type(given).__name__}")


def load_fitting(load: Callable[[Any], object], state: Any, what: str) -> None:
    """Call ``load(state)``; raise `InputError` if `state` is of another model or optimizer, which `what` names."""
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        given = " ".join(str(error).split())
        raise InputError("resume", what, f"of the form that the checkpoint has ({given})") from error
