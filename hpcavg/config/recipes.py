"""Recipes: the experiments of the papers as TOML files, in the folder ``papers``. Light to import.

A recipe's name is ``paper/experiment``. The first line of its file is its title. A line such as
``# Vary: --k2 8, 16; --k1 2, 4`` stands for one run with each combination of these values. Several such lines do not
combine with each other.
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
    """Return the recipe's file if `path` is a recipe's name and no file exists there, otherwise `path` itself."""
    name = path.removesuffix(".toml")
    return FOLDER / f"{name}.toml" if not os.path.exists(path) and name in names() else Path(path)


def hint(path: str) -> str:
    """Return a hint for an error message about a missing file: the recipes with similar names."""
    near = difflib.get_close_matches(path.removesuffix(".toml")[:100], names(), n=3)
    return f", or a recipe: {', '.join(near)}" if near else ", or one of the recipes that --config help lists"


def title(name: str) -> str:
    """Return the title of a recipe."""
    return _text(name).partition("\n")[0].removeprefix("# ")


def variations(name: str) -> list[dict[str, str]]:
    """Return the options of every run that the recipe's ``# Vary:`` lines stand for, as texts by option name."""
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
