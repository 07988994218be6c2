"""The summary of a run: its fields, and the table that shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from hpcavg.errors import InputError
from hpcavg.progress import is_terminal


class Summary(TypedDict):
    """The contents of ``summary.json``. Seconds are means over the ranks; bytes are those of one learner."""

    algorithm: str
    task: str
    num_learners: int
    num_ranks: int
    num_nodes: int
    group_size: int
    steps: int
    epochs: float
    samples: int
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    learner_test_loss: float
    learner_test_accuracy: float | None
    global_averages: int
    local_averages: int
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
    try:
        return json.loads((folder / "summary.json").read_text())
    except OSError as error:
        allowed = f"the folder of a finished run (summary.json: {error.strerror})"
        raise InputError("folder", folder, allowed) from error
    except ValueError as error:
        raise InputError("folder", folder, f"a run whose summary.json is JSON ({error})") from error


def rows(path: Path, summary: Summary) -> list[tuple[str, str]]:
    """Return the table of a run as pairs of label and text."""
    accuracy = summary["test_accuracy"]
    own = summary["learner_test_accuracy"]
    return [
        ("algorithm", summary["algorithm"].replace("_", "-")),
        ("task", summary["task"]),
        ("learners", f"{summary['num_learners']} in groups of {summary['group_size']}, {summary['num_nodes']} nodes"),
        ("steps", f"{summary['steps']} ({summary['epochs']:.1f} epochs, {summary['samples']} samples)"),
        ("test accuracy", "-" if accuracy is None else f"{accuracy:.4f}" + ("" if own is None else f" ({own:.4f})")),
        ("test loss", f"{summary['test_loss']:.4f}"),
        ("train loss", f"{summary['train_loss']:.4f}"),
        ("global averages", str(summary["global_averages"])),
        ("local averages", str(summary["local_averages"])),
        ("averaged per learner", f"{summary['bytes_averaged'] / 1e6:.1f} MB"),
        ("blocked by averaging", f"{summary['averaging_blocked_s']:.2f} s"),
        ("wall time", f"{summary['wall_s']:.2f} s (start-up {summary['startup_s']:.1f} s)"),
        ("folder", str(path)),
    ]


def show(runs: Sequence[tuple[Path, Summary]]) -> None:
    """Print the table of one or several runs, a column each."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for entries in zip(*(rows(path, summary) for path, summary in runs), strict=True):
        table.add_row(entries[0][0], *(text for _, text in entries))
    # Outside a terminal rich would cut the lines at 80 columns, and with them the folder's name.
    Console(width=None if is_terminal() else 60 + 60 * len(runs)).print(table)
