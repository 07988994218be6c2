"""One rank's metrics: an HDF5 file, readable during the run and after it was killed.

Every dataset is one column of a table, as `columns.COLUMNS` defines it. A resumed run adds a file per rank, a segment,
and never opens an earlier one again; `view` puts the files together.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcavg.errors import reason
from hpcavg.results.columns import COLUMNS, FORMAT, Column, fill_value

_CHUNK_ROWS = 1024


class Recorder:
    """Writes one rank's metrics.

    Rows are kept in memory and appended when `flush_s` seconds have passed, at `flush` and at `close`: what is in the
    file after a crash is everything up to the last of these.

    A file that cannot be made or written (a full disk, a folder that has gone) stops no training: nothing is raised,
    `lost` says why, and no more rows are kept from then on. What was flushed before can still be read.

    Parameters
    ----------
    path : the file to make; one that exists is left alone, and records are lost.
    attributes : what the run was, as attributes of the file.
    flush_s : seconds between flushes.
    rows_before : rows of each table that count from earlier segments, written as ``rows_before_step`` and so on.

    Attributes
    ----------
    lost : why rows are being lost, in one line; None as long as none are.
    rows_lost : how many rows were lost, of all tables.
    """

    def __init__(
        self, path: Path, attributes: Mapping[str, Any], flush_s: float, rows_before: Mapping[str, int] | None = None
    ) -> None:
        self.lost: str | None = None
        self.rows_lost = 0
        self._path, self._flush_s = path, flush_s
        self._flushed_at = time.monotonic()
        self._rows: dict[str, list[tuple[Any, ...]]] = {group: [] for group in COLUMNS}
        self._positions = {group: (rows_before or {}).get(group, 0) for group in COLUMNS}
        self._datasets: dict[str, list[h5py.Dataset]] = {}
        self._file: h5py.File | None = None
        with self._giving_up_on_failure():
            self._file = h5py.File(path, "x", libver="latest")
            self._file.attrs.update({**attributes, "format": FORMAT})
            self._file.attrs.update({f"rows_before_{group}": rows for group, rows in self._positions.items()})
            for group, columns in COLUMNS.items():
                self._datasets[group] = [self._create(f"{group}/{name}", columns[name]) for name in columns]
            self._file.swmr_mode = True

    def _create(self, name: str, column: Column) -> h5py.Dataset:
        assert self._file is not None
        # A view that counts on more rows than came to be written reads the fill value in their place.
        dataset = self._file.create_dataset(
            name, (0,), column.dtype, maxshape=(None,), chunks=(_CHUNK_ROWS,), fillvalue=fill_value(column)
        )
        dataset.attrs["units"] = column.units
        return dataset

    def record(self, group: str, *row: Any) -> None:
        """Append one row, in the order of ``COLUMNS[group]``. Scalar tensors are read only when the row is written."""
        self._positions[group] += 1
        if self.lost is not None:
            self.rows_lost += 1
            return
        self._rows[group].append(row)
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def positions(self) -> dict[str, int]:
        """Return how many rows of each table of the whole run were recorded so far, lost ones included."""
        return dict(self._positions)

    def flush(self) -> None:
        """Write all rows that are still in memory."""
        columns = {
            group: [
                np.array(values, dtype=column.dtype)
                for column, values in zip(COLUMNS[group].values(), zip(*rows, strict=True), strict=True)
            ]
            for group, rows in self._rows.items()
            if rows
        }
        if self._file is not None:
            with self._giving_up_on_failure():
                self._path.stat()  # a file whose name has gone could still be written, for nobody to read
                for group, arrays in columns.items():
                    for dataset, values in zip(self._datasets[group], arrays, strict=True):
                        end = len(dataset)
                        dataset.resize((end + len(values),))
                        dataset[end:] = values
                self._file.flush()
        for rows in self._rows.values():
            rows.clear()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self.flush()
        if self._file is not None:
            with self._giving_up_on_failure():
                self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _giving_up_on_failure(self) -> Iterator[None]:
        """Turn a failure to write into lost records."""
        try:
            yield
        except Exception as error:  # HDF5's come as OSError, RuntimeError, ValueError and KeyError
            self.lost = f"{self._path}: {reason(error)}"
            self.rows_lost += sum(map(len, self._rows.values()))
            file, self._file = self._file, None
            if file:
                _abandon(file)


def _abandon(file: h5py.File) -> None:
    """Close a file that cannot be written.

    HDF5 does not let go of such a file: it tries again at the end of the process, and crashes. So whatever it still has
    to write goes to the null device.
    """
    with contextlib.suppress(Exception):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, file.id.get_vfd_handle(), inheritable=False)
        os.close(null)
        file.close()
