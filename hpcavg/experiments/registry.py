"""All experiments, by name, in the order of the page. A paper's module is imported when it is needed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module

from hpcavg.errors import UsageError
from hpcavg.experiments.experiment import PAPERS, Experiment
from hpcavg.utils.text import printable


def experiments() -> dict[str, Experiment]:
    """Return all experiments, by name."""
    modules = (import_module(f"{__package__}.{paper.replace('-', '_')}") for paper in PAPERS)
    return {experiment.name: experiment for module in modules for experiment in module.EXPERIMENTS}


def chosen(names: Iterable[str]) -> list[Experiment]:
    """Return the experiments of these names, or of papers of these names; all if there are none.

    Raises
    ------
    UsageError
        If a name is unknown.
    """
    known = experiments()
    found: dict[str, Experiment] = {}
    for name in names:
        of_name = {key: each for key, each in known.items() if name in (key, each.paper)}
        if not of_name:
            near = difflib.get_close_matches(name[:100], [*PAPERS, *known], n=3)
            hint = f"near it: {', '.join(near)}" if near else "paper --list prints them"
            raise UsageError(f"{printable(name)}: neither an experiment nor a paper; {hint}")
        found |= of_name
    return list((found or known).values())


def describe() -> str:
    """Return a list of all experiments, one line each."""
    known = experiments().values()
    width = max((len(each.name) for each in known), default=0)
    return "\n".join(f"{each.name:{width}}  {each.where}: {each.claim}" for each in known)
