"""Metrics: one HDF5 file per rank, readable while the run goes on and after it was killed, and one view of them all.

Every dataset is one column of a table; `COLUMNS` names them with their types and units. A resumed run adds a file per
rank, a segment, and never opens an earlier one again. Rows that were recorded after the checkpoint that the run came
back to are taken again: they stay in their files and out of the view.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import reason
from hpcavg.utils import files

# Several parallel file systems refuse HDF5's locks; every rank writes a file of its own and readers use SWMR.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
import h5py


class Column(NamedTuple):
    """Type, unit, the value that stands for "not there", None for HDF5's own, and whether earlier versions had none."""

    dtype: str
    units: str
    missing: Any
    is_later: bool = False


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
        "period_steps": _COUNT._replace(is_later=True),
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
        "test_top5_accuracy": _NUMBER._replace(is_later=True),
        "learner_test_loss": _NUMBER,
        "learner_test_accuracy": _NUMBER,
    },
}
_CHUNK_ROWS = 1024
VIEW = "all.h5"

Positions = Sequence[Mapping[str, int]]
"""Of every rank, how many rows of each table count: what `Recorder.positions` of all ranks returned at a checkpoint."""


def file_name(rank: int, segment: int = 0) -> str:
    """Return the name of a rank's file inside ``metrics/``; `segment` counts how often the run was resumed."""
    return f"rank-{rank:05d}-{segment}.h5" if segment else f"rank-{rank:05d}.h5"


def rank_files(folder: Path) -> list[tuple[int, int]]:
    """Return rank and segment of every rank's file in `folder`."""
    found = (re.fullmatch(r"rank-(\d{5,9})(?:-(\d{1,9}))?\.h5", path.name) for path in folder.glob("rank-*.h5"))
    return sorted((int(match[1]), int(match[2] or 0)) for match in found if match)


def num_segments(folder: Path) -> int:
    """Return how many segments have files in `folder`, those included that came to nothing."""
    return max((1 + segment for _, segment in rank_files(folder)), default=0)


def continued(folder: Path, resumed: Sequence[Positions], positions: Positions) -> list[Positions]:
    """Return the history of the segment that begins now in `folder`; its length is the segment's number.

    `resumed` is the history of the segment that wrote the checkpoint, `positions` what the checkpoint holds. Segments
    that began since then, and whose rows are superseded with this, are passed over.
    """
    return [*resumed, *[positions] * max(1, num_segments(folder) - len(resumed))]


def rows_before(resumed: Sequence[Positions], rank: int) -> dict[str, int]:
    """Return how many rows of each table come before those of `rank` in the segment with the history `resumed`.

    A rank that was not there before begins after the longest of those that were.
    """
    rows = dict.fromkeys(COLUMNS, 0)
    for positions in resumed:
        if rank < len(positions):
            rows = {group: positions[rank][group] for group in COLUMNS}
        else:
            rows = {group: max(rows[group], *(others[group] for others in positions)) for group in COLUMNS}
    return rows


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
            self._file.attrs.update(attributes)
            self._file.attrs.update({f"rows_before_{group}": rows for group, rows in self._positions.items()})
            for group, columns in COLUMNS.items():
                self._datasets[group] = [self._create(f"{group}/{name}", columns[name]) for name in columns]
            self._file.swmr_mode = True

    def _create(self, name: str, column: Column) -> h5py.Dataset:
        assert self._file is not None
        # A view that counts on more rows than came to be written reads the fill value in their place.
        dataset = self._file.create_dataset(
            name, (0,), column.dtype, maxshape=(None,), chunks=(_CHUNK_ROWS,), fillvalue=column.missing
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


def write_view(folder: Path, num_ranks: int, resumed: Sequence[Positions] = ()) -> None:
    """Write ``all.h5``: every column of every rank's files as one dataset of shape (ranks, rows), nothing copied.

    It may be made before the files exist and follows them as they grow. What is missing is filled with -1 or NaN. Open
    it with ``swmr=True`` while the run goes on or after it was killed.

    Parameters
    ----------
    folder : where the files are. An earlier view is replaced, whole or not at all; raises OSError.
    num_ranks : ranks of the segment that now begins. The view has as many as the largest segment had.
    resumed : see `continued`; empty for a run that starts afresh.
    """
    ranks = max(num_ranks, *map(len, resumed), 0)
    # starts[s][rank]: the rows before segment s, which are the rows up to which segment s - 1 counts
    starts = [[rows_before(resumed[:s], rank) for rank in range(ranks)] for s in range(len(resumed) + 1)]
    image = io.BytesIO()  # HDF5 does not survive a disk that is full; a few bytes in memory do
    with h5py.File(image, "w", libver="latest") as file:
        for group, columns in COLUMNS.items():
            rows = [[before[group] for before in segment] for segment in starts]
            for name, column in columns.items():
                layout = _layout(f"{group}/{name}", column.dtype, rows)
                dataset = file.create_virtual_dataset(f"{group}/{name}", layout, fillvalue=column.missing)
                dataset.attrs["units"] = column.units
    files.replace_file(folder / VIEW, [image.getvalue()])


def begin_segment(folder: Path, saved: Mapping[str, Any] | None, num_ranks: int) -> list[Positions]:
    """Write the view of the segment of `num_ranks` that begins now in `folder`; return its history.

    saved : what the checkpoint that the run goes on from holds, ``resumed`` and ``positions``; None where it starts
    afresh.
    """
    segments: list[Positions] = []
    if saved is not None:
        told = [[_rows(rows) for rows in positions] for positions in (*saved["resumed"], saved["positions"])]
        segments = continued(folder, told[:-1], told[-1])
    elif num_segments(folder):
        segments = continued(folder, [], [_rows({})] * num_ranks)
    write_view(folder, num_ranks, segments)
    return segments


def _rows(told: Mapping[str, int]) -> dict[str, int]:
    """Return how many rows of every table there are: none of those that were not known yet."""
    rows = {group: told.get(group, 0) for group in COLUMNS}
    if not all(type(number) is int and number >= 0 for number in rows.values()):
        raise ValueError("rows of metrics that are no numbers")
    return rows


def _layout(name: str, dtype: str, starts: Sequence[Sequence[int]]) -> h5py.VirtualLayout:
    """Return one column of the view: each segment from where it starts to where the next does, the last as it grows."""
    ranks, unlimited = len(starts[0]), h5py.h5s.UNLIMITED
    layout = h5py.VirtualLayout(shape=(ranks, 1 + max(map(max, starts))), maxshape=(ranks, None), dtype=dtype)
    for segment, begins in enumerate(starts):
        for rank, start in enumerate(begins):
            source = partial(h5py.VirtualSource, file_name(rank, segment), name, dtype=dtype, maxshape=(None,))
            if segment + 1 == len(starts):
                layout[rank, start:unlimited] = source(shape=(1,))[0:unlimited]
            elif length := starts[segment + 1][rank] - start:
                layout[rank, start : start + length] = source(shape=(length,))[0:length]
    return layout


def read_view(folder: Path, group: str) -> dict[str, NDArray[Any]]:
    """Return the columns of `group` from ``all.h5`` in `folder`, each of shape (ranks, rows), missing rows filled.

    A row that is being written, and so is not in every column yet, is left out. Of a column that came later than the
    run all rows are missing.
    """
    # On a damaged file HDF5 gives up at once where it may; as a reader beside a writer it would try again for minutes.
    names = [VIEW, *(file_name(rank, segment) for rank, segment in rank_files(folder))]
    states = [_is_open(folder / name) for name in names]  # of all of them: HDF5 would wait for a pipe
    with h5py.File(folder / VIEW, "r", swmr=any(states)) as file:
        there = {name for name, column in COLUMNS[group].items() if name in file[group] or not column.is_later}
        columns = {name: file[group][name][...] for name in there}
    rows = min(values.shape[1] for values in columns.values())
    ranks = max(map(len, columns.values()))
    return {
        name: columns[name][:, :rows] if name in there else np.full((ranks, rows), column.missing, column.dtype)
        for name, column in COLUMNS[group].items()
    }


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a rank's file, also of one that is being written."""
    with h5py.File(path, "r", swmr=_is_open(path)) as file:
        return dict(file.attrs)


def _is_open(path: Path) -> bool:
    """Return whether somebody writes the file at `path`, or left it open when killed; `OSError` where it is none."""
    with files.open_file(path) as file:
        superblock = file.read(12)  # signature and version (9 bytes), two sizes, consistency flags
    return superblock[:9] == b"\x89HDF\r\n\x1a\n\x03" and superblock[11:] > b"\0"
