"""The columns of the metrics: each is defined here, once. Light to import.

`COLUMNS` makes the files, the view of all ranks, the report and the table in docs/metrics.md. A new column takes its
definition here, at the end of its table, and the code that computes its value.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any, NamedTuple

from hpcavg.utils import markdown

# The first version of hpcavg.
_FIRST = "0.1.0"


class Column(NamedTuple):
    """One column of a table.

    Parameters
    ----------
    dtype : str
        NumPy's name of the type.
    units : str
        The unit, 1 for a number without one.
    missing : Any
        Stands for a value that is not there.
    text : str
        What a value says, for the docs.
    source : str
        The attribute that holds the value, of the record that `row_of` takes; empty if it has the column's name.
    since : str
        The version of hpcavg that wrote the column first.
    """

    dtype: str
    units: str
    missing: Any
    text: str
    source: str = ""
    since: str = _FIRST


def _count(text: str, source: str = "", units: str = "1", since: str = _FIRST) -> Column:
    return Column("i8", units, -1, text, source, since)


def _number(text: str, source: str = "", units: str = "1", since: str = _FIRST) -> Column:
    return Column("f8", units, math.nan, text, source, since)


def _seconds(text: str, since: str = _FIRST) -> Column:
    return _number(text, units="s", since=since)


COLUMNS: dict[str, dict[str, Column]] = {
    "step": {
        "step": _count("number of the step, from 1"),
        "epoch": _count("number of its epoch, from 1"),
        "loss": _number("training loss of this learner's mini-batch"),
        "learning_rate": _number("learning rate of the first parameter group"),
        "compute_s": _seconds("forward and backward passes and the optimizer's step"),
        "data_s": _seconds("waiting for the mini-batch"),
        "averaging_s": _seconds("blocked by means or exchanges"),
    },
    "averaging": {
        "step": _count("step at which it was due"),
        "scope": Column(
            "S16", "1", b"", "`local`, `global`, `server`, or the name of a graph of neighbours", "scope.name"
        ),
        "period_steps": _count("steps of this learner since the last global mean or exchange"),
        "started_s": _seconds("its start, since the averager was made"),
        "blocked_s": _seconds("time for which this learner could not compute"),
        "in_flight_s": _seconds("from its start until the mean was there"),
        "bytes": _count("bytes that this learner brought into it", "num_bytes", "byte"),
        "consensus_distance": _number("this learner's ||x_j - x̄||² before the mean was merged"),
    },
    "arrival": {
        "learner": _count("learner that sent the update"),
        "arrived_s": _seconds("time of its arrival, since the server was made; in simulated time: mean steps"),
        "staleness": _count("updates that the server applied since the learner's last fetch"),
    },
    "evaluation": {
        "step": _count("steps of this learner so far"),
        "epoch": _count("epochs so far"),
        "train_loss": _number("training loss of the epoch, mean over the learners"),
        "test_loss": _number("test loss of the mean model", "mean.loss"),
        "test_accuracy": _number("test accuracy of the mean model", "mean.accuracy"),
        "test_top5_accuracy": _number("top-5 accuracy of the mean model", "mean.top5_accuracy"),
        "learner_test_loss": _number("test loss of the learners' own models, their mean", "learners.loss"),
        "learner_test_accuracy": _number("test accuracy of the learners' own models, their mean", "learners.accuracy"),
    },
}
ROWS = {
    "step": "step",
    "averaging": "mean or exchange",
    "arrival": "update that a server applied, in its file; of a simulated server, in that of the learner",
    "evaluation": "epoch",
}
"""What each table has a row for."""


FORMAT = 1
"""The last format of the view that is known here, and the format of the file of a rank with one learner."""
STACKED_FORMAT = 2
"""The format of the file of a rank with several learners: datasets have one more axis, the first, for them."""

LEARNERS_PER_RANK = "learners_per_rank"
"""In the positions of a learner whose rank has several: how many. Its rank and row in the files follow from it."""

_SOURCES = {
    table: attrgetter(*(column.source or name for name, column in columns.items()))
    for table, columns in COLUMNS.items()
}


def fill_value(column: Column) -> Any:
    """Return the fill value for h5py; None for a text, whose address h5py gets wrong. HDF5 then fills in empty ones."""
    return column.missing or None


def markdown_table() -> str:
    """Return the tables of all columns for the docs."""
    return "\n\n".join(
        f"`{table}`: a row per {ROWS[table]}.\n\n"
        + markdown.table(
            ("column", "unit", "value", "since"),
            ((f"`{name}`", column.units, column.text, column.since) for name, column in columns.items()),
        )
        for table, columns in COLUMNS.items()
    )


def row_of(table: str, record: object) -> tuple[Any, ...]:
    """Return a row of `table`: of each column, the attribute of `record` that is its source."""
    return _SOURCES[table](record)
