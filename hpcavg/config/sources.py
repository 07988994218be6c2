"""Makes a configuration from its sources: defaults, a TOML file, the command line. Light to import."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcavg import algorithms
from hpcavg.config import recipes
from hpcavg.config.components import FORMER_ENGINES
from hpcavg.config.options import CONFIG_FILE, OPTIONS, Config, underscored
from hpcavg.config.section import UNSET
from hpcavg.config.sections.method import ARGUMENTS
from hpcavg.errors import InputError, reason
from hpcavg.utils import files, format_version
from hpcavg.utils.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ALTERNATIVES = (
    ("epochs", "steps"),
    ("steps", "epochs"),
    ("learners", "learners_per_rank"),
    ("learners_per_rank", "learners"),
)
FORMAT = 1
"""The newest format of ``config.toml`` that this version can read."""


def from_sources(path: str | None, options: Mapping[str, Any]) -> Config:
    """Return the configuration of defaults, then a TOML file, then `options`; the later source wins.

    If `options` resume a run, its own ``config.toml`` and folder are the defaults of `path` and ``output``.

    Parameters
    ----------
    path : a TOML file, or the name of a recipe.
    options : options by flat names, as values or as texts.

    Raises
    ------
    InputError
        If the file cannot be read, contains an unknown option, or a value cannot be used.
    """
    resumed = options.get("resume")
    if resumed not in (None, "auto"):
        run = run_of(Path(resumed))
        if run is not None:
            path = path or str(run / CONFIG_FILE)
            options = {"output": str(run), **options}
    values = {} if path is None else _read_options(path)
    chosen = underscored(options.get("algorithm"))
    if (
        chosen in algorithms.ALGORITHMS
    ):  # the command line's choice: the file's options of other algorithms do not count
        own = set(algorithms.option_names(chosen))
        if underscored(values.get("algorithm", chosen)) != chosen:
            own = set()  # the file is for another algorithm, whose options may have the same names
        foreign = set(ARGUMENTS) - own
        if algorithms.ALGORITHMS[chosen]().server is None:
            foreign |= {"num_servers", "step_times"}
        values = {name: value for name, value in values.items() if name not in foreign}
    if options.get("schedule", "step") != "step":  # the command line's choice: the file's decays do not count
        values = {name: value for name, value in values.items() if name not in ("decay_steps", "decay_epochs")}
    for name, other in _ALTERNATIVES:
        if options.get(name, UNSET) != UNSET:  # the command line's choice replaces the file's
            values.pop(other, None)
    return Config(**{**values, **options})


def run_of(path: Path) -> Path | None:
    """Return the folder of a run, given this folder or one of the run's checkpoints; None for any other path."""
    folders = (path, *path.absolute().parents[:2])
    return next((folder for folder in folders if os.path.lexists(folder / CONFIG_FILE)), None)


def read_toml(path: Path | str) -> dict[str, Any]:
    """Return the options in the TOML file `path`. Raises `OSError`, `ValueError` or `RecursionError` if it has none."""
    values = tomllib.loads(files.read_small(path).decode("utf-8-sig"))
    format_version.check(values.pop("format", format_version.FIRST), FORMAT)
    return values


def _read_options(path: str) -> dict[str, Any]:
    try:
        read = read_toml(recipes.find(path))
    except OSError as error:
        hint = recipes.hint(path)
        raise InputError("config", path, f"a file that can be read ({reason(error)}){hint}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, numbers or nesting beyond Python's limits
        raise InputError("config", path, f"a TOML file ({printable(reason(error))})") from error
    values: dict[str, Any] = {}
    if read.get("engine") in FORMER_ENGINES:
        warnings.warn(f"{path}: the engine {read['engine']} is no more; auto takes its place", stacklevel=2)
        read["engine"] = "auto"
    for key, value in read.items():
        name = underscored(key)
        if name not in OPTIONS:
            unknown = f"{printable(repr(name))} is none of {', '.join(OPTIONS)}, {format_version.NEWER}"
            raise InputError("config", path, f"a file of known options; {unknown}")
        if name in values:
            raise InputError("config", path, f"a file that sets {name} once")
        values[name] = value
    return values
