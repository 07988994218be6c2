"""Metrics: one HDF5 file per rank, readable while the run goes on and after it was killed, and one view of them all.

Every dataset is one column of a table; `COLUMNS` names them with their types and units.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Several parallel file systems refuse HDF5's locks; every rank writes a file of its own and readers use SWMR.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
import h5py


class Column(NamedTuple):
    """Type, unit and the value that stands for "not there" in the joined view, None for HDF5's own."""

    dtype: str
    units: str
    missing: Any


_COUNT = Column("i8", "1", -1)
_NUMBER = Column("f8", "1", np.nan)
_SECONDS = Column("f8", "s", np.nan)

COLUMNS: dict[str, dict[str, Column]] = {
    "step": {
        "step": _COUNT,
        "epoch": _COUNT,
        "loss": _NUMBER,
        "learning_rate": _NUMBER,
        "compute_s": _SECONDS,
        "data_s": _SECONDS,
        "averaging_s": _SECONDS,
    },
    "averaging": {
        "step": _COUNT,
        "scope": Column("S6", "1", None),  # HDF5's own: the empty text. h5py hands over texts by a wrong address
        "period_steps": _COUNT,
        "started_s": _SECONDS,
        "blocked_s": _SECONDS,
        "in_flight_s": _SECONDS,
        "bytes": Column("i8", "byte", -1),
        "consensus_distance": _NUMBER,
    },
    "arrival": {
        "learner": _COUNT,
        "arrived_s": _SECONDS,
        "staleness": _COUNT,
    },
    "evaluation": {
        "step": _COUNT,
        "epoch": _COUNT,
        "train_loss": _NUMBER,
        "test_loss": _NUMBER,
        "test_accuracy": _NUMBER,
        "learner_test_loss": _NUMBER,
        "learner_test_accuracy": _NUMBER,
    },
}
_CHUNK_ROWS = 1024


def file_name(rank: int) -> str:
    """Return the name of a rank's file inside ``metrics/``."""
    return f"rank-{rank:05d}.h5"


class Recorder:
    """Writes one rank's metrics.

    Rows are kept in memory and appended when `flush_s` seconds have passed, at `flush` and at `close`: what is in the
    file after a crash is everything up to the last of these.

    Parameters
    ----------
    path : the file to make; it must not exist.
    attributes : what the run was, as attributes of the file.
    flush_s : seconds between flushes.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any], flush_s: float) -> None:
        self._flush_s = flush_s
        self._flushed_at = time.monotonic()
        self._rows: dict[str, list[tuple[Any, ...]]] = {group: [] for group in COLUMNS}
        self._file = h5py.File(path, "x", libver="latest")
        self._file.attrs.update(attributes)
        for group, columns in COLUMNS.items():
            for name, column in columns.items():
                dataset = self._file.create_dataset(
                    f"{group}/{name}", shape=(0,), maxshape=(None,), chunks=(_CHUNK_ROWS,), dtype=column.dtype
                )
                dataset.attrs["units"] = column.units
        self._file.swmr_mode = True

    def record(self, group: str, *row: Any) -> None:
        """Append one row, in the order of ``COLUMNS[group]``. Scalar tensors are read only when the row is written."""
        self._rows[group].append(row)
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write all rows that are still in memory."""
        for group, rows in self._rows.items():
            if rows:
                for (name, column), values in zip(COLUMNS[group].items(), zip(*rows, strict=True), strict=True):
                    dataset = self._file[group][name]
                    end = len(dataset)
                    dataset.resize((end + len(values),))
                    dataset[end:] = np.array(values, dtype=column.dtype)
                rows.clear()
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        if self._file:
            self.flush()
            self._file.close()


def write_view(folder: Path, num_ranks: int) -> None:
    """Write ``all.h5``: every column of every rank's file as one dataset of shape (ranks, rows), nothing copied.

    It may be made before the files exist and follows them as they grow. Short columns are filled with -1 or NaN. Open
    it with ``swmr=True`` while the run goes on or after it was killed.
    """
    unlimited = h5py.h5s.UNLIMITED
    with h5py.File(folder / "all.h5", "x", libver="latest") as file:
        for group, columns in COLUMNS.items():
            for name, column in columns.items():
                layout = h5py.VirtualLayout(shape=(num_ranks, 1), maxshape=(num_ranks, None), dtype=column.dtype)
                for rank in range(num_ranks):
                    source = h5py.VirtualSource(
                        file_name(rank), f"{group}/{name}", shape=(1,), maxshape=(None,), dtype=column.dtype
                    )
                    layout[rank, 0:unlimited] = source[0:unlimited]
                dataset = file.create_virtual_dataset(f"{group}/{name}", layout, fillvalue=column.missing)
                dataset.attrs["units"] = column.units


def read_view(folder: Path, group: str) -> dict[str, NDArray[Any]]:
    """Return the columns of `group` from ``all.h5`` in `folder`, each of shape (ranks, rows), missing rows filled."""
    with h5py.File(folder / "all.h5", "r", swmr=True) as file:
        return {name: file[group][name][...] for name in COLUMNS[group]}
