"""One run of an experiment: a function and its options, and the key under which its result is kept."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import hpcavg

if TYPE_CHECKING:
    from mpi4py import MPI

FORMAT = 1
"""The format of results: it goes up when a function returns something else for the same options."""

Result: TypeAlias = Mapping[str, Any]
"""What a run found: numbers, texts, and lists and mappings of them."""

# The code that decides what a run finds, and the libraries that do.
_CODE = (
    *("algorithms", "averaging", "config", "data", "distributed", "engines", "models", "tasks", "training"),
    *("experiments/functions", "experiments/problems.py"),
)
_LIBRARIES = ("torch", "numpy")


@dataclass(frozen=True)
class Run:
    """A run that has not been carried out yet.

    Parameters
    ----------
    function : the function that carries it out, as "module:name" with a module of `functions`. It is called on all
        ranks of the run as ``function(comm, folder, **options)``, with an empty folder of the run, and returns a
        `Result` on the first rank.
    options : its arguments: numbers, texts, and lists of them.
    work : how long it takes, compared to other runs, such as its number of steps of a learner.
    """

    function: str
    options: Mapping[str, Any]
    work: float = 1.0

    @cached_property
    def key(self) -> str:
        """Tell this run from runs with other options, and from those of other code."""
        content = [FORMAT, code_digest(), self.function, self.options]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"the run {self.function} with {options or 'no options'}"

    def __call__(self, comm: MPI.Intracomm, folder: Path) -> Result:
        """Carry it out. Collective over `comm`; only the first rank gets the result."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"{__package__}.functions.{module}"), name)(comm, folder, **self.options)


@functools.cache
def code_digest() -> str:
    """Return a digest of the code that decides what runs find. The results of other code are not used again."""
    package = Path(hpcavg.__file__).parent
    digest = hashlib.sha256(" ".join(map(version, _LIBRARIES)).encode())
    for name in _CODE:
        for path in sorted(package.glob(name if name.endswith(".py") else f"{name}/**/*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
