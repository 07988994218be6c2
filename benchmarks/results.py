"""The files of benchmarks: a JSON record for each run, and the folder of a suite with the records of its runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.figures import Figures, OverBest, figures, over_best_by_size
from hpcavg.errors import UsageError, reason
from hpcavg.utils import files
from hpcavg.utils.text import printable

SUITE_FILE = "suite.json"
OVER_BEST = "auto-over-best"
"""The plot of all means of a suite."""
ENVIRONMENT = {
    "ranks": "ranks",
    "nodes": "nodes",
    "node_names": "names of the nodes",
    "threads_per_rank": "threads of a rank",
    "cpu": "processor",
    "cpus": "processors of the first node",
    "platform": "platform",
    "mpi_library": "MPI library",
    "mpi4py": "mpi4py",
    "torch": "torch",
    "numpy": "numpy",
    "python": "Python",
    "git_revision": "git revision",
}
"""The entries of a record's environment, and their names on a page."""


@dataclass(frozen=True)
class Record:
    """A benchmark's JSON record.

    Attributes
    ----------
    path : the file.
    benchmark : the module of ``benchmarks``.
    environment : where it ran.
    options : its options.
    figures : by row and column.
    """

    path: Path
    benchmark: str
    environment: Mapping[str, Any]
    options: Mapping[str, Any]
    figures: Figures


@dataclass
class Outcome:
    """The outcome of one run of a suite.

    Attributes
    ----------
    name : the name of the run and of its files.
    command : what was started.
    state : how it ended.
    reason : why it failed or was not run, in one line.
    wall_s : the seconds that it took.
    ranks : the number of ranks that it is to have.
    """

    name: str
    command: list[str]
    state: Literal["not run", "done", "failed"] = "not run"
    reason: str = ""
    wall_s: float = 0.0
    ranks: int = 0


@dataclass
class Suite:
    """A suite.

    Attributes
    ----------
    preset : the name of its preset.
    command : its command line.
    started_in : the folder that it was started in.
    date : when it was started.
    load : the machine's load averages before it, over 1, 5 and 15 minutes.
    variables : the environment variables that MPI and its networks read.
    outcomes : of all runs, in their order.
    """

    preset: str
    command: list[str]
    started_in: str
    date: str
    load: list[float]
    variables: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write this suite to `folder`. Raises `OSError`."""
        files.replace_file(folder / SUITE_FILE, [(json.dumps(asdict(self), indent=2) + "\n").encode()])


def read_record(path: Path) -> Record:
    """Return the record in the file `path`; raise `UsageError` if it is not one."""
    return _record(path, _json(path, "the JSON file of a benchmark"))


def read_suite(folder: Path) -> Suite:
    """Return the suite in `folder`; raise `UsageError` if there is none."""
    allowed = "the folder of a suite"
    values = _json(folder / SUITE_FILE, allowed)
    try:
        outcomes = [Outcome(**outcome) for outcome in values.pop("outcomes")]
        return Suite(**values, outcomes=outcomes)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: must be {allowed}; its {SUITE_FILE} is damaged") from error


def records(folder: Path, suite: Suite) -> dict[str, Record]:
    """Return the records in a suite's folder by the names of the runs, those of failed runs included."""
    paths = {outcome.name: folder / f"{outcome.name}.json" for outcome in suite.outcomes}
    return {name: read_record(path) for name, path in paths.items() if path.exists()}


def over_best(records: Mapping[str, Record]) -> dict[str, dict[str, OverBest]]:
    """Return auto against the best by run and column, for the runs of `mean` that timed both."""
    means = {name: record for name, record in records.items() if record.benchmark == "mean"}
    found = {name: over_best_by_size(record.figures) for name, record in means.items()}
    return {name: by_size for name, by_size in found.items() if by_size}


def read_any(path: Path) -> tuple[dict[str, Record], dict[str, str]]:
    """Return the records of a suite's folder or of one file, by name, and the suite's variables, if any.

    Raises `UsageError` if `path` is neither.
    """
    if path.is_dir():
        suite = read_suite(path)
        return records(path, suite), suite.variables
    record = read_record(path)
    return {record.benchmark: record}, {}


def _record(path: Path, values: Any) -> Record:
    try:
        found = Record(path, values["benchmark"], values["environment"], values["options"], figures(values))
        if isinstance(found.environment, dict) and isinstance(found.options, dict):
            return found
        raise TypeError
    except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: must be the JSON file of a benchmark of this version") from error


def _json(path: Path, allowed: str) -> Any:
    try:
        return json.loads(files.read_small(path))
    except OSError as error:
        raise UsageError(f"{path}: must be {allowed} ({reason(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: must be {allowed} ({printable(error)})") from error
