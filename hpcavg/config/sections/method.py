"""The averaging algorithm and its arguments, which are those of the registry of algorithms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hpcavg import algorithms
from hpcavg.algorithms import registry
from hpcavg.config.section import Section, option
from hpcavg.config.sections.optimization import OptimizationOptions


@dataclass(frozen=True)
class Method(Section):
    """The averaging algorithm; `MethodOptions` adds a field for every argument of an algorithm."""

    title = "averaging"

    algorithm: str = option("hier_avg", "averaging algorithm", choices=tuple(algorithms.ALGORITHMS))

    @property
    def label(self) -> str:
        """The algorithm's name as the command line spells it."""
        return self.algorithm.replace("_", "-")


# The local optimizer's options stay its own, also if an algorithm has an argument of the same name: EAMSGD's momentum.
_OPTIMIZER = {field.name for field in dataclasses.fields(OptimizationOptions)}
ARGUMENTS = [name for name in algorithms.all_option_names() if name not in _OPTIMIZER]


def _field(name: str) -> tuple[str, Any, Any]:
    """Return name, type and field of an argument; None leaves its value to the algorithm."""
    return name, registry.option_type(name) | None, option(None, registry.option_help(name))


MethodOptions: type[Method] = dataclasses.make_dataclass(
    "MethodOptions", map(_field, ARGUMENTS), bases=(Method,), namespace={"__module__": __name__}, frozen=True
)
