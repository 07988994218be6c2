"""Recipes: the experiments of the papers as TOML files of this package, by name. Light to import.

A name is ``paper/experiment``. The file's first line says what it is. A line ``# Vary: --k2 8, 16; --k1 2, 4`` stands
for the runs that the experiment has with all combinations of these values; of several such lines each stands by itself.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "papers"
_VARY = "# Vary: "


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.toml"))


def find(path: str) -> Path:
    """Return the file that `path` names: itself where it exists or is no recipe's name either, else the recipe's."""
    name = path.removesuffix(".toml")
    return FOLDER / f"{name}.toml" if not os.path.exists(path) and name in names() else Path(path)


def hint(path: str) -> str:
    """Return what to say of recipes to whom `path` is no file: those with names near it."""
    near = difflib.get_close_matches(path.removesuffix(".toml")[:100], names(), n=3)
    return f", or a recipe: {', '.join(near)}" if near else ", or one of the recipes that --config help lists"


def title(name: str) -> str:
    """Return what a recipe is, in one line."""
    return _text(name).partition("\n")[0].removeprefix("# ")


def variations(name: str) -> list[dict[str, str]]:
    """Return the options, by name, of every run that the experiment's lines ``# Vary:`` stand for."""
    runs: list[dict[str, str]] = []
    for line in _text(name).splitlines():
        if line.startswith(_VARY):
            axes = dict(axis.split(maxsplit=1) for axis in line.removeprefix(_VARY).split(";"))
            options = [flag.removeprefix("--").replace("-", "_") for flag in axes]
            values = [re.split(r",\s*", listed.strip()) for listed in axes.values()]
            runs += [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*values)]
    return runs


def describe() -> str:
    """Return a list of all recipes, one line each."""
    width = max(map(len, names()))
    lines = [f"{name:{width}}  {title(name)}" for name in names()]
    return "\n".join([f"{'recipe':{width}}  what it is (P: the number of learners)", *lines])


def _text(name: str) -> str:
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
