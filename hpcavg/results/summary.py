"""The summary of a run: its fields, and the table that shows them."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from hpcavg.errors import reason
from hpcavg.utils import files
from hpcavg.utils.progress import is_terminal
from hpcavg.utils.text import counted, printable

# Of a table's columns, on a terminal.
_LABEL_WIDTH, _RUN_WIDTH = 26, 26


class Summary(TypedDict):
    """The contents of ``summary.json``. Seconds, bytes and counts of averages are means over the learners.

    Staleness is that of an asynchronous run's updates, null elsewhere. The consensus distance, (1/P) Σ ||x_j - x̄||², is
    that of the last global mean at which it was measured, null where it never was.

    Losses and accuracies may be NaN, in the file null: a run that diverged, a task without accuracy, or with too few
    classes for that of the top five.
    """

    algorithm: str
    task: str
    num_learners: int
    num_servers: int
    num_ranks: int
    num_nodes: int
    group_size: int
    steps: int
    epochs: float
    samples: int
    samples_per_learner: list[int]
    train_loss: float
    test_loss: float
    test_accuracy: float
    test_top5_accuracy: float
    learner_test_loss: float
    learner_test_accuracy: float
    global_averages: int
    local_averages: int
    exchanges: int
    staleness_mean: float | None
    staleness_max: int | None
    consensus_distance: float | None
    bytes_averaged: int
    wall_s: float
    compute_s: float
    data_s: float
    averaging_blocked_s: float
    evaluation_s: float
    checkpoint_s: float
    hidden_fraction: float | None
    startup_s: float
    seed: int
    parameters_sha256: str
    completed: bool


LATER: Mapping[str, Any] = {
    "num_servers": 0,
    "samples_per_learner": [0],
    "exchanges": 0,
    "staleness_mean": None,
    "staleness_max": None,
    "consensus_distance": None,
    "test_top5_accuracy": math.nan,
    "evaluation_s": math.nan,
    "checkpoint_s": math.nan,
}
"""The fields that earlier versions did not write, and what stands for "not measured", or for what they did not have."""


def read(folder: Path) -> Summary:
    """Return a run's summary, of an earlier or later version, too; fields that nobody knows here are left out.

    Raises `OSError` where it cannot be read, `ValueError` that says what is wrong where it is damaged or no summary.
    """
    kinds = typing.get_type_hints(Summary)
    try:
        found = json.loads(files.read_small(folder / "summary.json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"summary.json is no JSON ({printable(reason(error))})") from error
    if not isinstance(found, dict):
        raise ValueError("summary.json is no summary")
    first, *more = sorted(kinds.keys() - found.keys() - LATER.keys()) or [""]
    if first:
        raise ValueError(f"summary.json has no {first}" + (f" (and lacks {len(more)} more fields)" if more else ""))
    values = {name: found.get(name, LATER.get(name)) for name in kinds}
    for name, kind in kinds.items():
        if kind is float and values[name] is None:
            values[name] = math.nan
        if not _fits(values[name], kind):
            raise ValueError(f"summary.json has a wrong {name}")
    return typing.cast(Summary, values)


def _fits(value: object, kind: Any) -> bool:
    """Return whether `value`, read from JSON, may stand in a field of type `kind`."""
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and bool(value) and all(_fits(item, int) for item in value)
    if typing.get_args(kind):
        return any(_fits(value, member) for member in typing.get_args(kind))
    if kind is float:
        return isinstance(value, float) or _fits(value, int)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def _learners(values: Mapping[str, Any]) -> str:
    parts = [counted(values["num_learners"], "learner")]
    if values.get("local_averages"):
        parts.append(f" in groups of {values['group_size']}")
    if values.get("num_servers"):
        parts.append(f" and {counted(values['num_servers'], 'server')}")
    if "num_nodes" in values:
        parts.append(f", {counted(values['num_nodes'], 'node')}")
    return "".join(parts)


def _steps(values: Mapping[str, Any]) -> str:
    if "samples" not in values:
        return f"{values['steps']} so far"
    return f"{values['steps']} ({values['epochs']:.1f} epochs, {values['samples']} samples)"


def _samples(values: Mapping[str, Any]) -> str:
    samples = values["samples_per_learner"]
    if len(samples) == 1:
        return ""
    return f"{min(samples)} to {max(samples)}" if min(samples) < max(samples) else f"{samples[0]}"


def _exchanges(values: Mapping[str, Any]) -> str:
    staleness = values["staleness_mean"]
    more = "" if staleness is None else f", staleness {staleness:.1f}"
    return f"{values['exchanges']}{more}" if values["num_servers"] else ""


def _bytes(values: Mapping[str, Any]) -> str:
    from rich.filesize import decimal

    return "" if _is_alone(values) else decimal(values["bytes_averaged"])


def _is_alone(values: Mapping[str, Any]) -> bool:
    return values["num_learners"] == 1 and not values.get("num_servers")


def _fraction(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f} s"


_ROWS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "algorithm": lambda values: values["algorithm"].replace("_", "-"),
    "task": lambda values: values["task"],
    "state": lambda values: values["state"] if "state" in values else "" if values["completed"] else "stopped early",
    "learners": _learners,
    "steps": _steps,
    "samples per learner": _samples,
    "test accuracy": lambda values: _fraction(values["test_accuracy"]),
    "of the learners' own": lambda values: "" if _is_alone(values) else _fraction(values["learner_test_accuracy"]),
    "top-5 accuracy": lambda values: _fraction(values["test_top5_accuracy"]),
    "test loss": lambda values: f"{values['test_loss']:.4f}",
    "train loss": lambda values: f"{values['train_loss']:.4f}",
    "global averages": lambda values: "" if values["num_servers"] else str(values["global_averages"]),
    "local averages": lambda values: str(values["local_averages"] or ""),
    "exchanges with servers": _exchanges,
    "averaged per learner": _bytes,
    "blocked by averaging": lambda values: "" if _is_alone(values) else _seconds(values["averaging_blocked_s"]),
    "evaluation": lambda values: _seconds(values["evaluation_s"]),
    "checkpoints": lambda values: _seconds(values["checkpoint_s"] or math.nan),
    "wall time": lambda values: f"{values['wall_s']:.2f} s (start-up {values['startup_s']:.1f} s)",
}


def rows(path: Path, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a run as pairs of label and text, empty for what was not measured or does not apply.

    values : a `Summary`, or of an unfinished run what is known of it, and as ``state`` why it is not all.
    """

    def known(text: Callable[[Mapping[str, Any]], str]) -> str:
        try:
            return text(values)
        except KeyError:
            return ""

    return [*((label, known(text)) for label, text in _ROWS.items()), ("folder", str(path))]


def show(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Print the table of one or several runs, a column each; on a terminal as many tables as its width asks for."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Outside a terminal rich would cut the lines at 80 columns, and with them the folder's name.
    console = Console(width=None if is_terminal() else 60 + 260 * len(runs))
    columns = max(1, (console.width - _LABEL_WIDTH) // _RUN_WIDTH)
    for first in range(0, len(runs), columns):
        # Texts as they are: rich would take what is in square brackets for markup.
        table = Table(show_header=False)
        for entries in zip(*(rows(path, values) for path, values in runs[first : first + columns]), strict=True):
            if any(text for _, text in entries):
                table.add_row(entries[0][0], *(Text(printable(text)) for _, text in entries))
        console.print(table)
