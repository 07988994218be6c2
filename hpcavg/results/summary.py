"""The summary of a run: its fields, its file, and the table that shows it."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from hpcavg.errors import reason
from hpcavg.utils import files, format_version, markdown
from hpcavg.utils.progress import is_terminal
from hpcavg.utils.text import counted, printable

FILE = "summary.json"
# Of a table's columns, on a terminal.
_LABEL_WIDTH, _RUN_WIDTH = 26, 26


FORMAT = 1
"""The last format of ``summary.json`` that is known here."""
_REQUIRED = object()


class Field(NamedTuple):
    """One field of a summary.

    Parameters
    ----------
    text : str
        What its value says, for the docs.
    part : str
        Its name as a part of the wall time in the report's plot; empty for none.
    absent : Any
        Stands for it in a file of a version that did not write it; left out for a field that has always been there.
    since : str
        The version of hpcavg that wrote the field first.
    """

    text: str
    part: str = ""
    absent: Any = _REQUIRED
    since: str = "0.1.0"


class Summary(TypedDict):
    """The contents of ``summary.json``: each field is defined here, once, with its type and meaning.

    Reading, the report and the table in docs/metrics.md are made from `FIELDS`. A new field takes its definition here
    and the code that computes its value.

    Losses and accuracies may be NaN, in the file null: a run that diverged, a task without accuracy, or with too few
    classes for that of the top five.
    """

    algorithm: Annotated[str, Field("the averaging algorithm")]
    task: Annotated[str, Field("name of the task")]
    num_learners: Annotated[int, Field("learners at the end")]
    learners_per_rank: Annotated[int, Field("learners that each rank holds", absent=1)]
    stacked: Annotated[
        str | None,
        Field(
            "how the learners of a rank compute: `vmap`, all at once, or `loop`, one after the other, and why; null"
            " for one learner per rank",
            absent=None,
        ),
    ]
    num_servers: Annotated[int, Field("parameter servers", absent=0)]
    num_ranks: Annotated[int, Field("ranks, with learners and servers")]
    num_nodes: Annotated[int, Field("nodes")]
    group_size: Annotated[int, Field("learners of the largest local group")]
    steps: Annotated[int, Field("steps, mean over the learners")]
    epochs: Annotated[float, Field("epochs that these steps are")]
    samples: Annotated[int, Field("training samples seen by all learners together")]
    samples_per_learner: Annotated[
        list[int], Field("training samples of each learner; they differ if learners go at their own pace", absent=[0])
    ]
    train_loss: Annotated[float, Field("training loss of the last epoch, mean over the learners")]
    test_loss: Annotated[float, Field("test loss of the final model, the mean over all learners")]
    test_accuracy: Annotated[float, Field("test accuracy of the final model; null for a task without it")]
    test_top5_accuracy: Annotated[
        float,
        Field(
            "part of the test samples whose class is among the five largest outputs; null up to ten classes, and for"
            " tasks that count in their own way",
            absent=math.nan,
        ),
    ]
    learner_test_loss: Annotated[
        float,
        Field("test loss just before the final mean, of each learner on its part of the test set, averaged"),
    ]
    learner_test_accuracy: Annotated[float, Field("test accuracy of the same")]
    global_averages: Annotated[int, Field("global means of a learner")]
    local_averages: Annotated[int, Field("local means of a learner")]
    exchanges: Annotated[int, Field("exchanges of a learner with servers", absent=0)]
    staleness_mean: Annotated[
        float | None, Field("mean staleness of the updates that servers applied; null without servers", absent=None)
    ]
    staleness_max: Annotated[int | None, Field("largest staleness of these updates", absent=None)]
    consensus_distance: Annotated[
        float | None,
        Field(
            "(1/P) Σ ||x_j - x̄||² at the last global mean at which it was measured; null if it never was", absent=None
        ),
    ]
    crossings: Annotated[
        str | None,
        Field("ways of arrays between nodes that a trial has chosen, by size; null if there was no trial", absent=None),
    ]
    bytes_averaged: Annotated[int, Field("bytes that a learner brought into means and exchanges")]
    wall_s: Annotated[float, Field("seconds from the first step to the end, mean over the learners")]
    compute_s: Annotated[float, Field("seconds of `wall_s` in passes and optimizer steps", "compute")]
    data_s: Annotated[float, Field("seconds of `wall_s` waiting for mini-batches", "data")]
    averaging_blocked_s: Annotated[float, Field("seconds of `wall_s` blocked by means and exchanges", "blocked")]
    evaluation_s: Annotated[
        float, Field("seconds of `wall_s` in evaluations, with their mean", "evaluation", absent=math.nan)
    ]
    checkpoint_s: Annotated[float, Field("seconds of `wall_s` in checkpoints", "checkpoints", absent=math.nan)]
    hidden_fraction: Annotated[
        float | None,
        Field("part of the means' time in flight that did not block a learner; null for blocking algorithms"),
    ]
    startup_s: Annotated[float, Field("seconds from the start of the slowest process to the first step")]
    seed: Annotated[int, Field("seed of the run")]
    parameters_sha256: Annotated[
        str, Field("SHA-256 of `checkpoints/final.safetensors`: equal for models that are equal bit for bit")
    ]
    completed: Annotated[bool, Field("whether the run took all its steps")]


_HINTS = typing.get_type_hints(Summary, include_extras=True)
FIELDS: Mapping[str, Field] = {name: typing.get_args(hint)[1] for name, hint in _HINTS.items()}
"""The fields by name, in the order of the file."""
KINDS: Mapping[str, Any] = {name: typing.get_args(hint)[0] for name, hint in _HINTS.items()}
"""The type of each field."""
DEFAULTS: Mapping[str, Any] = {name: field.absent for name, field in FIELDS.items() if field.absent is not _REQUIRED}
"""The fields that earlier versions did not write, and what stands for them."""

PARTS: Mapping[str, str] = {name: field.part for name, field in FIELDS.items() if field.part}
"""The parts of the wall time, each with its label. The rest is the loop's own, or was not measured yet."""


def markdown_table() -> str:
    """Return the table of all fields for the docs."""
    rows = [(f"`{name}`", field.text, field.since) for name, field in FIELDS.items()]
    return markdown.table(("field", "value", "since"), rows)


def write(folder: Path, values: Summary) -> None:
    """Write ``summary.json`` of the run in `folder`, whole or not at all. Raises `OSError`."""
    files.write_json(folder / FILE, {"format": FORMAT, **values})


def read(folder: Path) -> Summary:
    """Return the summary of the run in `folder`, of any version. Fields that are unknown here are left out.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged, no summary, or of a newer format (`NewerFormatError`); the text says which.
    """
    try:
        found = json.loads(files.read_small(folder / FILE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FILE} is no JSON ({printable(reason(error))})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{FILE} is no summary")
    format_version.check(found.get("format", format_version.FIRST), FORMAT)
    first, *more = sorted(FIELDS.keys() - found.keys() - DEFAULTS.keys()) or [""]
    if first:
        raise ValueError(f"{FILE} has no {first}" + (f" (and lacks {len(more)} more fields)" if more else ""))
    values = {name: found.get(name, DEFAULTS.get(name)) for name in FIELDS}
    for name, kind in KINDS.items():
        if kind is float and values[name] is None:
            values[name] = math.nan
        if not _fits(values[name], kind):
            raise ValueError(f"{FILE} has a wrong {name}")
    return typing.cast(Summary, values)


def _fits(value: object, kind: Any) -> bool:
    """Return whether `value`, read from JSON, is of type `kind`."""
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
    if values.get("learners_per_rank", 1) > 1:
        parts.append(f", {values['learners_per_rank']} in each rank")
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
    return f"{values['exchanges']}{more}" if _has_servers(values) else ""


def _has_servers(values: Mapping[str, Any]) -> bool:
    """Return whether there were servers, real or simulated ones."""
    return bool(values["num_servers"] or values["exchanges"])


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
    "global averages": lambda values: "" if _has_servers(values) else str(values["global_averages"]),
    "local averages": lambda values: str(values["local_averages"] or ""),
    "exchanges with servers": _exchanges,
    "averaged per learner": _bytes,
    "blocked by averaging": lambda values: "" if _is_alone(values) else _seconds(values["averaging_blocked_s"]),
    "evaluation": lambda values: _seconds(values["evaluation_s"]),
    "checkpoints": lambda values: _seconds(values["checkpoint_s"] or math.nan),
    "wall time": lambda values: f"{values['wall_s']:.2f} s (start-up {values['startup_s']:.1f} s)",
}


def rows(path: Path, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a run as pairs of label and text; empty texts for what is unknown or does not apply.

    Parameters
    ----------
    path : Path
        The run's folder.
    values : mapping
        A `Summary`, or for an unfinished run the known fields and a ``state``.
    """

    def known(text: Callable[[Mapping[str, Any]], str]) -> str:
        try:
            return text(values)
        except KeyError:
            return ""

    return [*((label, known(text)) for label, text in _ROWS.items()), ("folder", str(path))]


def show(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Print the table of one or several runs, a column each. A narrow terminal gets several tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Outside a terminal, rich would cut the lines, and the folder's name, at 80 columns.
    console = Console(width=None if is_terminal() else 60 + 260 * len(runs))
    columns = max(1, (console.width - _LABEL_WIDTH) // _RUN_WIDTH)
    for first in range(0, len(runs), columns):
        # As Text: in a plain string, rich would take square brackets for markup.
        table = Table(show_header=False)
        for entries in zip(*(rows(path, values) for path, values in runs[first : first + columns]), strict=True):
            if any(text for _, text in entries):
                table.add_row(entries[0][0], *(Text(printable(text)) for _, text in entries))
        console.print(table)
