"""Pickled arrays, read without unpickling: nothing is imported and nothing is called, whatever the file says.

``pickletools`` splits a pickle into its instructions, checking every length against what the file has. The few that
data sets written by Python 2 or 3 consist of are followed here; they can build numbers, texts, bytes, tuples, lists,
dicts and NumPy arrays of numbers, and every byte of them has to be in the file. Any other instruction is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IGNORED = {"PROTO", "FRAME"}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_BYTES_OF_PYTHON_2 = {"BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = {b"u1", b"i1", b"u2", b"i2", b"u4", b"i4", b"u8", b"i8", b"f4", b"f8"}
_RECONSTRUCT = {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"}
_MARK = object()
_MAX_INSTRUCTIONS = 2**18  # each takes a byte, and what it makes may take a hundred in memory


@dataclass(frozen=True)
class _Name:
    """A name of a module that would be imported by others."""

    name: str


@dataclass
class _Dtype:
    """A NumPy dtype in the making."""

    code: str


@dataclass
class _Array:
    """A NumPy array in the making: its value comes after the references to it."""

    value: NDArray[Any] | None = None


def read(data: bytes) -> Any:
    """Return what the pickle in `data` holds; keys of dicts that are bytes become texts.

    Raises `ValueError` that says why for a pickle that is cut off, is endlessly long or holds anything but numbers,
    texts, bytes, tuples, lists, dicts and arrays.
    """
    reader = _Reader(len(data))
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == _MAX_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {number} instructions")
        if opcode.name == "STOP":
            return _finished(reader.pop())
        reader.follow(opcode.name, argument)
    raise ValueError("a pickle without an end")


class _Reader:
    """The stack and memory of a pickle."""

    def __init__(self, num_bytes: int) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._bytes_left = num_bytes  # that `_codecs.encode` may still copy

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("a pickle that takes what it has not given")
        return self._stack.pop()

    def follow(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        push = self._stack.append
        if name in _NUMBERS:
            push(_CONSTANTS.get(name, argument))
        elif name in _TEXTS or name in _BYTES:
            push(argument)
        elif name in _BYTES_OF_PYTHON_2:
            push(argument.encode("latin-1"))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError("a pickle that refers to what it has not given")
            push(self._memo[argument])
        elif name == "MARK":
            push(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            push([] if name == "EMPTY_LIST" else {})
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            push(tuple(reversed(items)))
        elif name == "TUPLE":
            push(tuple(self._since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self._since_mark()
            self._top_of(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self._since_mark()
            self._set(self._top_of(dict), items)
        elif name == "GLOBAL":
            push(_Name(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise ValueError("a pickle with a name that is no text")
            push(_Name(f"{module} {attribute}"))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            push(self._call(function, arguments))
        elif name == "BUILD":
            state = self.pop()
            self._build(self._top(), state)
        elif name not in _IGNORED:
            raise ValueError(f"only numbers, texts, bytes, lists, dicts and arrays, and no {name}")

    def _top(self) -> Any:
        self._stack.append(self.pop())
        return self._stack[-1]

    def _top_of(self, kind: type) -> Any:
        if not isinstance(self._top(), kind):
            raise ValueError(f"a pickle that adds to what is no {kind.__name__}")
        return self._top()

    def _since_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("a pickle that takes what it has not given")
        self._stack.pop()
        return items[::-1]

    def _set(self, to: dict[str, Any], items: list[Any]) -> None:
        if len(items) % 2 or not all(isinstance(key, (str, bytes)) for key in items[::2]):
            raise ValueError("only dicts whose keys are texts")
        keys = [key.decode("latin-1") if isinstance(key, bytes) else key for key in items[::2]]
        to.update(zip(keys, items[1::2], strict=True))

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what the call makes that a pickled array needs; refuse every other."""
        name = function.name if isinstance(function, _Name) else type(function).__name__
        arguments = arguments if isinstance(arguments, tuple) else ()
        if name in _RECONSTRUCT and len(arguments) == 3 and arguments[0] == _Name("numpy ndarray"):
            return _Array()
        if name == "numpy dtype" and arguments and isinstance(arguments[0], (str, bytes)):
            code = arguments[0].encode("latin-1", "replace") if isinstance(arguments[0], str) else arguments[0]
            if code in _DTYPES:
                return _Dtype(code.decode())
        if name == "_codecs encode" and len(arguments) == 2 and arguments[1] in ("latin1", "latin-1", b"latin1"):
            text = arguments[0]
            if isinstance(text, str) and len(text) <= self._bytes_left:
                self._bytes_left -= len(text)
                return text.encode("latin-1")
        raise ValueError(f"only numbers, texts, bytes, lists, dicts and arrays, and no {name.replace(' ', '.')}")

    def _build(self, thing: Any, state: Any) -> None:
        """Give an array, or its dtype, its state as NumPy pickles it."""
        if not isinstance(state, tuple):
            raise ValueError("only arrays have a state")
        if isinstance(thing, _Dtype) and len(state) > 1 and state[1] in ("<", ">", "|", "=", b"<", b">", b"|", b"="):
            order = state[1].decode() if isinstance(state[1], bytes) else state[1]
            thing.code = order + thing.code.lstrip("<>|=")
        elif isinstance(thing, _Array) and len(state) == 5:
            _, shape, dtype, is_fortran, data = state
            if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or not isinstance(shape, tuple):
                raise ValueError("only arrays of numbers")
            array = np.frombuffer(data, np.dtype(dtype.code))
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError("only arrays with sizes of at least 0")
            thing.value = array.reshape(shape, order="F" if is_fortran else "C")
        else:
            raise ValueError("only arrays have a state")


def _finished(value: Any) -> Any:
    """Return `value` with the arrays that it, or the dict that it is, holds."""
    if isinstance(value, dict):
        return {key: entry.value if isinstance(entry, _Array) else entry for key, entry in value.items()}
    return value.value if isinstance(value, _Array) else value
