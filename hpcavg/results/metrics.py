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

    Rows stay in memory until `flush_s` seconds have passed, or until `flush` or `close`. After a crash the file has all
    rows up to the last of these.

    A file that cannot be written (a full disk, a removed folder) does not stop the training: nothing is raised, `lost`
    says why, and later rows are dropped. Rows that were flushed before can still be read.

    Parameters
    ----------
    path : Path
        The file to make. If it exists, it is left alone, and the rows are lost.
    attributes : mapping
        What the run is, as attributes of the file.
    flush_s : float
        Seconds between flushes.
    rows_before : mapping
        Rows of each table in earlier segments; written as the attributes ``rows_before_step`` and so on.

    Attributes
    ----------
    lost : str or None
        Why rows are lost, in one line; None if none are.
    rows_lost : int
        How many rows were lost, of all tables.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hpcavg.results import view
    >>> folder = Path(tempfile.mkdtemp())
    >>> view.write_view(folder, num_ranks=1)
    >>> recorder = Recorder(folder / view.file_name(0), {"algorithm": "k_avg"}, flush_s=2)
    >>> recorder.record("evaluation", 12, 1, 0.5, 0.4, 0.9, 1.0, 0.45, 0.88)
    >>> recorder.close()
    >>> view.read_view(folder, "evaluation")["test_accuracy"].tolist()
    [[0.9]]
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
        self._missing = {group: [column.missing for column in columns.values()] for group, columns in COLUMNS.items()}
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
        # The view may expect more rows than were written; it then reads the fill value.
        dataset = self._file.create_dataset(
            name, (0,), column.dtype, maxshape=(None,), chunks=(_CHUNK_ROWS,), fillvalue=fill_value(column)
        )
        dataset.attrs["units"] = column.units
        return dataset

    def record(self, group: str, *row: Any) -> None:
        """Append one row, in the order of ``COLUMNS[group]``. A scalar tensor is read when the row is written.

        A row may be shorter, as that of a loop that was written before there were the last columns. They are missing.
        """
        missing = self._missing[group]
        if len(row) > len(missing):
            raise ValueError(f"a row of {len(row)} values for the {len(missing)} columns of {group}")
        self._positions[group] += 1
        if self.lost is not None:
            self.rows_lost += 1
            return
        self._rows[group].append((*row, *missing[len(row) :]))
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def positions(self) -> dict[str, int]:
        """Return the rows of each table that the whole run recorded so far, lost ones included."""
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
                self._path.stat()  # a file that was removed could still be written, but nobody could read it
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
        """Turn a failure to write into lost rows."""
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

    HDF5 would write it again at the end of the process, and crash. What is left goes to the null device instead.
    """
    with contextlib.suppress(Exception):
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, file.id.get_vfd_handle(), inheritable=False)
        os.close(null)
        file.close()
