"""Keeps torch's compiler out of processes that do not compile.

Torch's optimizers import ``torch._dynamo`` at their first step, to call two functions that do nothing in eager mode.
The import costs a second of processor time and about 100 MB on every rank. A stand-in provides the two functions; it
becomes the real module when anything else is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    @staticmethod
    def graph_break(*args: Any, **kwargs: Any) -> None:
        """Do nothing, as the real one does outside a compiled region."""

    @staticmethod
    def disable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return the function: there is no compiler to hide it from."""
        return function

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":  # inspect asks all modules for it, in the middle of imports
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            torch._dynamo = import_module(_NAME)
        return getattr(sys.modules[_NAME], name)


def defer_compiler_import() -> None:
    """Put the stand-in where ``torch._dynamo`` would be, unless the real one is already there."""
    if _NAME not in sys.modules:
        stand_in = _StandIn(_NAME)
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in
