"""The summary of a run: its fields, and the table that shows them."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from hpcavg import files
from hpcavg.errors import InputError, printable, reason
from hpcavg.progress import is_terminal


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
    hidden_fraction: float | None
    startup_s: float
    seed: int
    parameters_sha256: str
    completed: bool


def read(folder: Path) -> Summary:
    """Return a run's summary; raises `InputError` where the folder has none that can be read."""
    kinds = typing.get_type_hints(Summary)
    try:
        values = json.loads(files.read_small(folder / "summary.json"))
    except OSError as error:
        allowed = f"the folder of a finished run (summary.json: {reason(error)})"
        raise InputError("folder", folder, allowed) from error
    except (ValueError, RecursionError) as error:
        allowed = f"a run whose summary.json is JSON ({printable(reason(error))})"
        raise InputError("folder", folder, allowed) from error
    missing = kinds.keys() - values if isinstance(values, dict) else kinds.keys()
    if missing:
        raise InputError("folder", folder, f"a run whose summary.json has {', '.join(sorted(missing))}")
    for name, kind in kinds.items():
        if kind is float and values[name] is None:
            values[name] = math.nan
        if not _fits(values[name], kind):
            raise InputError("folder", folder, f"a run whose summary.json is undamaged; it has a wrong {name}")
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


def counted(number: int, noun: str) -> str:
    """Return for example ``1 node`` or ``2 nodes``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rows(path: Path, summary: Summary) -> list[tuple[str, str]]:
    """Return the table of a run as pairs of label and text, empty for what was not measured."""
    from rich.filesize import decimal

    learners, group_size = counted(summary["num_learners"], "learner"), summary["group_size"]
    servers = f" and {counted(summary['num_servers'], 'server')}" if summary["num_servers"] else ""
    samples = summary["samples_per_learner"]
    spread = f"{min(samples)} to {max(samples)}" if min(samples) < max(samples) else f"{samples[0]}"
    staleness = "" if summary["staleness_mean"] is None else f", staleness {summary['staleness_mean']:.1f}"
    return [
        ("algorithm", summary["algorithm"].replace("_", "-")),
        ("task", summary["task"]),
        ("learners", f"{learners} in groups of {group_size}{servers}, {counted(summary['num_nodes'], 'node')}"),
        ("steps", f"{summary['steps']} ({summary['epochs']:.1f} epochs, {summary['samples']} samples)"),
        ("samples per learner", spread),
        ("test accuracy", f"{summary['test_accuracy']:.4f}"),
        ("of the learners' own", f"{summary['learner_test_accuracy']:.4f}"),
        ("top-5 accuracy", _if_measured(summary["test_top5_accuracy"])),
        ("test loss", f"{summary['test_loss']:.4f}"),
        ("train loss", f"{summary['train_loss']:.4f}"),
        ("global averages", str(summary["global_averages"])),
        ("local averages", str(summary["local_averages"])),
        ("exchanges with servers", f"{summary['exchanges']}{staleness}" if summary["exchanges"] else "0"),
        ("averaged per learner", decimal(summary["bytes_averaged"])),
        ("blocked by averaging", f"{summary['averaging_blocked_s']:.2f} s"),
        ("wall time", f"{summary['wall_s']:.2f} s (start-up {summary['startup_s']:.1f} s)"),
        ("folder", str(path)),
    ]


def _if_measured(accuracy: float) -> str:
    return "" if math.isnan(accuracy) else f"{accuracy:.4f}"


def show(runs: Sequence[tuple[Path, Summary]]) -> None:
    """Print the table of one or several runs, a column each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Texts as they are: rich would take what is in square brackets for markup.
    table = Table(show_header=False)
    for entries in zip(*(rows(path, summary) for path, summary in runs), strict=True):
        if any(text for _, text in entries):
            table.add_row(entries[0][0], *(Text(printable(text)) for _, text in entries))
    # Outside a terminal rich would cut the lines at 80 columns, and with them the folder's name.
    Console(width=None if is_terminal() else 60 + 60 * len(runs)).print(table)
