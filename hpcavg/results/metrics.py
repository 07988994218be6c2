"""One rank's metrics: an HDF5 file, readable during the run and after it was killed.

Every dataset is one column of a table, as `columns.COLUMNS` defines it. If the rank has several learners, each has a
row of the dataset, and the attribute ``learners`` tells the first and the one after the last. A resumed run adds a file
per rank, a segment, and never opens an earlier one again; `view` puts the files together.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import reason
from hpcavg.results.columns import COLUMNS, FORMAT, LEARNERS_PER_RANK, STACKED_FORMAT, Column, fill_value

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
    rows_before : mapping, or sequence of mappings
        Rows of each table in earlier segments; written as the attributes ``rows_before_step`` and so on. One for each
        learner if there are several.
    learners : range
        The rank's learners.

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
    >>> view.write_view(folder, num_learners=1)
    >>> recorder = Recorder(folder / view.file_name(0), {"algorithm": "k_avg"}, flush_s=2)
    >>> recorder.record("evaluation", 12, 1, 0.5, 0.4, 0.9, 1.0, 0.45, 0.88)
    >>> recorder.close()
    >>> view.read_view(folder, "evaluation")["test_accuracy"].tolist()
    [[0.9]]
    """

    def __init__(
        self,
        path: Path,
        attributes: Mapping[str, Any],
        flush_s: float,
        rows_before: Mapping[str, int] | Sequence[Mapping[str, int]] = (),
        learners: range = range(1),
    ) -> None:
        self.lost: str | None = None
        self.rows_lost = 0
        self._path, self._flush_s = path, flush_s
        self._flushed_at = time.monotonic()
        self._rows: dict[str, list[tuple[Any, ...]]] = {group: [] for group in COLUMNS}
        self._learners = learners
        before = [rows_before] if isinstance(rows_before, Mapping) else rows_before or [{}] * len(learners)
        self._of: dict[str, list[Sequence[int] | None]] = {group: [] for group in COLUMNS}
        self._positions = {group: np.array([rows.get(group, 0) for rows in before]) for group in COLUMNS}
        self._ends = {group: np.zeros(len(before), dtype=int) for group in COLUMNS}  # rows in the file
        self._missing = {group: [column.missing for column in columns.values()] for group, columns in COLUMNS.items()}
        self._datasets: dict[str, list[h5py.Dataset]] = {}
        self._file: h5py.File | None = None
        with self._giving_up_on_failure():
            self._file = h5py.File(path, "x", libver="latest")
            self._file.attrs.update({**attributes, "format": FORMAT})
            if self._has_several:
                self._file.attrs.update({"format": STACKED_FORMAT, "learners": [learners.start, learners.stop]})
            for group, rows in self._positions.items():
                self._file.attrs[f"rows_before_{group}"] = rows if self._has_several else int(rows[0])
            for group, columns in COLUMNS.items():
                self._datasets[group] = [self._create(f"{group}/{name}", columns[name]) for name in columns]
            self._file.swmr_mode = True

    @property
    def _has_several(self) -> bool:
        return len(self._learners) > 1

    def _create(self, name: str, column: Column) -> h5py.Dataset:
        assert self._file is not None
        # The view may expect more rows than were written; it then reads the fill value.
        learners = (len(self._learners),) if self._has_several else ()
        chunks = (*learners, max(64, _CHUNK_ROWS // max(1, len(self._learners))) if learners else _CHUNK_ROWS)
        dataset = self._file.create_dataset(
            name, (*learners, 0), column.dtype, maxshape=(*learners, None), chunks=chunks, fillvalue=fill_value(column)
        )
        dataset.attrs["units"] = column.units
        return dataset

    def record(self, group: str, *row: Any, of: Sequence[int] | None = None) -> None:
        """Append one row, in the order of ``COLUMNS[group]``. A tensor is read when the row is written.

        A row may be shorter, as that of a loop that was written before there were the last columns. They are missing.

        If the rank has several learners, a value is one for all of them, or a sequence, array or tensor of one for
        each. Only the learners `of` these rows get the row; None: all of them.
        """
        missing = self._missing[group]
        if len(row) > len(missing):
            raise ValueError(f"a row of {len(row)} values for the {len(missing)} columns of {group}")
        self._positions[group][slice(None) if of is None else of] += 1
        if self.lost is not None:
            self.rows_lost += 1
            return
        self._rows[group].append((*row, *missing[len(row) :]))
        self._of[group].append(of)
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def positions(self, row: int = 0) -> dict[str, int]:
        """Return the rows of each table that the whole run recorded so far for a learner, lost ones included.

        If the rank has several learners, the number of them is there, too, by which `view` finds the learner's file.
        """
        rows = {group: int(counts[row]) for group, counts in self._positions.items()}
        return {**rows, LEARNERS_PER_RANK: len(self._learners)} if self._has_several else rows

    def flush(self) -> None:
        """Write all rows that are still in memory."""
        columns = {
            group: [
                self._array(values, column.dtype)
                for column, values in zip(COLUMNS[group].values(), zip(*rows, strict=True), strict=True)
            ]
            for group, rows in self._rows.items()
            if rows
        }
        if self._file is not None:
            with self._giving_up_on_failure():
                self._path.stat()  # a file that was removed could still be written, but nobody could read it
                for group, arrays in columns.items():
                    self._append(group, arrays)
                self._file.flush()
        for group in COLUMNS:
            self._rows[group].clear()
            self._of[group].clear()
        self._flushed_at = time.monotonic()

    def _array(self, values: Sequence[Any], dtype: str) -> NDArray[Any]:
        """Return the values of a column, a row of them for each learner if there are several."""
        if not self._has_several:
            return np.array(values, dtype=dtype)
        array = np.empty((len(self._learners), len(values)), dtype)
        for index, value in enumerate(values):
            array[:, index] = value.tolist() if hasattr(value, "tolist") else value  # a tensor may be on a GPU
        return array

    def _append(self, group: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Append the arrays, shape (rows,) or (learners, rows), to the columns of `group`."""
        is_kept = np.ones((len(self._ends[group]), len(self._of[group])), dtype=bool)
        for index, of in enumerate(self._of[group]):
            if of is not None:
                is_kept[:, index] = False
                is_kept[of, index] = True
        begins = self._ends[group]
        self._ends[group] = ends = begins + is_kept.sum(axis=1)
        for dataset, values in zip(self._datasets[group], arrays, strict=True):
            dataset.resize(ends.max(), axis=dataset.ndim - 1)
            if is_kept.all() and begins.min() == begins.max():
                dataset[..., begins[0] :] = values
                continue
            for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):  # learners at their own pace
                if end > begin:
                    dataset[row, begin:end] = values[row, is_kept[row]]

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
