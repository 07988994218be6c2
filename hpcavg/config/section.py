"""How a section of options is declared, checked and read. Light to import: no torch, no MPI.

A section is a frozen dataclass. `option` declares a field that is an option of the command line and of TOML files;
`argument` declares a field for the library alone. A check stands beside its option. The section's ``__post_init__``
checks what concerns several of its options.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hpcavg.errors import InputError, require_integer, require_number

UNSET = "unset"
"""The value that means None. With it, the command line takes back what a file sets."""

Check = Callable[[str, Any], None]
"""Takes an option's name and value; raises `InputError` if the value cannot be used."""


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    choices: tuple[str, ...] | None = None,
    name: str | None = None,
) -> Any:
    """Return the field of an option of the command line and of TOML files.

    Parameters
    ----------
    default : its value if it is not given. Only an option whose default is None may be None.
    help : one line for ``--help``.
    check : called with every value but None.
    choices : the texts that it may be.
    name : its name on the command line and in files, with underscores. None: the field's.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "check": check, "choices": choices, "name": name, "is_option": True}
    )


def argument(
    default: Any, check: Check | None = None, *, choices: tuple[str, ...] | None = None, compare: bool = True
) -> Any:
    """Return the field of an argument that only the library takes.

    Parameters
    ----------
    default : as in `option`; ``dataclasses.MISSING`` for none.
    check : as in `option`.
    choices : as in `option`.
    compare : whether the value must be the same on all ranks.
    """
    metadata = {"check": check, "choices": choices, "is_option": False}
    return dataclasses.field(default=default, compare=compare, metadata=metadata)


def integer(minimum: int, maximum: int | None = None) -> Check:
    """Return the check for an integer in ``minimum..maximum``."""
    return lambda name, value: require_integer(name, value, minimum, maximum)


def number(holds: Callable[[float], bool], allowed: str) -> Check:
    """Return the check for a finite number for which `holds` is true; `allowed` says which."""
    return lambda name, value: require_number(name, value, holds, allowed)


def not_empty(allowed: str) -> Check:
    """Return the check for a text that is not empty; `allowed` says what it is."""

    def check(name: str, value: Any) -> None:
        if value == "":
            raise InputError(name, value, allowed)

    return check


class Section:
    """Base of all sections: checks every field when the section is made.

    Attributes
    ----------
    title : heading of its options in ``--help``. Sections may share one.
    """

    title: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value, choices, check = getattr(self, field.name), field.metadata["choices"], field.metadata["check"]
            if value is None and field.default is None:
                continue
            if isinstance(field.default, bool) and value not in (False, True):  # "no" would count as true
                raise InputError(field.name, value, "true or false")
            if choices is not None and value not in choices:
                raise InputError(field.name, value, f"one of {', '.join(map(_dashed, choices))}")
            if check is not None:
                check(field.name, value)

    def require(self, name: str, holds: bool, allowed: str) -> None:
        """Raise `InputError` of field `name` unless the condition `holds`; `allowed` says what would have been."""
        if not holds:
            value = getattr(self, name)
            raise InputError(name, ",".join(map(str, value)) if isinstance(value, tuple) else value, allowed)


@dataclass(frozen=True)
class Option:
    """One option of the command line and of files.

    Attributes
    ----------
    name : its name with underscores, unique among all options.
    section : name of the section that holds it.
    field : name of the section's field.
    title : its heading in ``--help``.
    kinds : the types that its value may have. A text is read as the first that fits.
    default : the value if the option is not given.
    help : one line of text.
    choices : the texts that the value may be. None: no such list.
    """

    name: str
    section: str
    field: str
    title: str
    kinds: tuple[Any, ...]
    default: Any
    help: str
    choices: tuple[str, ...] | None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return f"--{_dashed(self.name)}"

    def read(self, value: Any) -> Any:
        """Return a text of the command line, or a value of a TOML file, as the type that the option has.

        Raises `InputError` if it is something else, or none of the choices.
        """
        if (value is None or value == UNSET) and type(None) in self.kinds:
            return None
        for kind in self.kinds:
            try:
                result = _read(value, kind)
            except (TypeError, ValueError, AttributeError, OverflowError):
                continue
            return self._chosen(result)
        texts = {bool: "true or false", str: "a text", int: "an integer below 2^63", float: "a finite number"}
        several = "sizes such as 3x32x32" if self._is_shape else "integers such as 4,2,1"
        raise InputError(self.name, value, texts.get(self.kinds[0], several))

    def write(self, value: Any) -> Any:
        """Return a value as a TOML file holds it."""
        return self.text(value) if self._is_shape else value

    def text(self, value: Any) -> str:
        """Return a value as the command line takes it."""
        if isinstance(value, tuple):
            return ("x" if self._is_shape else ",").join(map(str, value))
        return str(value)

    @property
    def _is_shape(self) -> bool:
        """Whether the values are as many integers as a shape has sizes: 3x32x32, not 4,2,1."""
        kind = self.kinds[0]
        return typing.get_origin(kind) is tuple and Ellipsis not in typing.get_args(kind)

    def _chosen(self, value: Any) -> Any:
        """Return the choice that `value` names; dashes and underscores are the same."""
        if self.choices is None:
            return value
        for choice in self.choices:
            if _dashed(value) == _dashed(choice):
                return choice
        raise InputError(self.name, value, f"one of {', '.join(map(_dashed, self.choices))}")


def options_of(section: str, owner: type[Section]) -> list[Option]:
    """Return the options of the dataclass `owner`, which is the section of that name."""
    types_of = typing.get_type_hints(owner)
    return [
        Option(
            name=field.metadata["name"] or field.name,
            section=section,
            field=field.name,
            title=owner.title,
            kinds=tuple(dict.fromkeys(_kinds(types_of[field.name]))),
            default=field.default,
            help=field.metadata["help"],
            choices=field.metadata["choices"],
        )
        for field in dataclasses.fields(owner)  # type: ignore[arg-type]  # subclasses of Section are dataclasses
        if field.metadata["is_option"]
    ]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _read(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`; raises one of several exceptions if it is something else."""
    if typing.get_origin(kind) is tuple:
        parts = re.split("[x,]", value) if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)):
            return tuple(_read(part, int) for part in parts)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        value.encode()  # raises for what is no Unicode, such as the bytes of a file's name in another encoding
        if "\0" not in value:
            return value
    elif not isinstance(value, bool) and not (kind is int and isinstance(value, float)) and math.isfinite(kind(value)):
        result = kind(value)
        if kind is float or abs(result) < 2**63:
            return result
    raise TypeError(value)


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a type hint stands for: members of a union, the type of literals, tuples for sequences."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return [kind for member in args for kind in _kinds(member)]
    if origin is typing.Literal:
        return [type(value) for value in args]
    if origin is Sequence:
        return [tuple[args[0], ...]]  # type: ignore[valid-type]
    return [hint]
