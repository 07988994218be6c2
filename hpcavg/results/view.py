"""The metrics of all learners as one: the segments of a resumed run, ``all.h5`` over their files, and reading it.

Rows that were recorded after the checkpoint that the run came back to are recorded again. The earlier ones stay in
their files and out of the view.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcavg.results.columns import COLUMNS, FORMAT, LEARNERS_PER_RANK, fill_value
from hpcavg.utils import files, format_version

VIEW = "all.h5"

Positions = Sequence[Mapping[str, int]]
"""For every learner, its rows of each table: what `Recorder.positions` returned for all of them at a checkpoint."""


def file_name(rank: int, segment: int = 0) -> str:
    """Return the name of a rank's file inside ``metrics/``. `segment` counts how often the run was resumed."""
    return f"rank-{rank:05d}-{segment}.h5" if segment else f"rank-{rank:05d}.h5"


def rank_files(folder: Path) -> list[tuple[int, int]]:
    """Return rank and segment of every rank's file in `folder`."""
    found = (re.fullmatch(r"rank-(\d{5,9})(?:-(\d{1,9}))?\.h5", path.name) for path in folder.glob("rank-*.h5"))
    return sorted((int(match[1]), int(match[2] or 0)) for match in found if match)


def num_segments(folder: Path) -> int:
    """Return how many segments have files in `folder`, superseded ones included."""
    return max((1 + segment for _, segment in rank_files(folder)), default=0)


def continued(folder: Path, resumed: Sequence[Positions], positions: Positions) -> list[Positions]:
    """Return the history of the segment that begins now. Its length is the segment's number.

    Segments that began after the checkpoint was written are superseded: none of their rows count.

    Parameters
    ----------
    folder : Path
        Of the metrics.
    resumed : sequence of Positions
        The history of the segment that wrote the checkpoint.
    positions : Positions
        Those in the checkpoint.
    """
    return [*resumed, *[positions] * max(1, num_segments(folder) - len(resumed))]


def rows_before(resumed: Sequence[Positions], learner: int) -> dict[str, int]:
    """Return, for each table, how many rows of `learner` come before the segment with the history `resumed`.

    A new learner begins after the longest of the earlier ones.
    """
    rows = dict.fromkeys(COLUMNS, 0)
    for positions in resumed:
        if learner < len(positions):
            rows = {group: positions[learner][group] for group in COLUMNS}
        else:
            rows = {group: max(rows[group], *(others[group] for others in positions)) for group in COLUMNS}
    return rows


def write_view(folder: Path, num_learners: int, resumed: Sequence[Positions] = (), learners_per_rank: int = 1) -> None:
    """Write ``all.h5``: every column of all files as one dataset of shape (learners, rows). Nothing is copied.

    It may be written before the files exist, and follows them as they grow. Missing rows read as -1, NaN or the empty
    text. Open it with ``swmr=True`` during the run, or after it was killed.

    Parameters
    ----------
    folder : Path
        Of the files. An earlier view is replaced, whole or not at all.
    num_learners : int
        Learners of the segment that begins now, and servers, which come last. The view has as many as the largest
        segment.
    resumed : sequence of Positions
        See `continued`; empty for a new run.
    learners_per_rank : int
        Learners in each file of the segment that begins now.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    learners = max(num_learners, *map(len, resumed), 0)
    # starts[s][learner]: the rows before segment s, which are the rows up to which segment s - 1 counts
    starts = [[rows_before(resumed[:s], learner) for learner in range(learners)] for s in range(len(resumed) + 1)]
    in_files = [*(positions[0].get(LEARNERS_PER_RANK, 1) for positions in resumed), learners_per_rank]
    image = io.BytesIO()  # HDF5 does not survive a disk that is full; a few bytes in memory do
    with h5py.File(image, "w", libver="latest") as file:
        file.attrs["format"] = FORMAT
        for group, columns in COLUMNS.items():
            rows = [[before[group] for before in segment] for segment in starts]
            for name, column in columns.items():
                layout = _layout(f"{group}/{name}", column.dtype, rows, in_files)
                dataset = file.create_virtual_dataset(f"{group}/{name}", layout, fillvalue=fill_value(column))
                dataset.attrs["units"] = column.units
    files.replace_file(folder / VIEW, [image.getvalue()])


def begin_segment(
    folder: Path, saved: Mapping[str, Any] | None, num_learners: int, learners_per_rank: int = 1
) -> list[Positions]:
    """Write the view for the segment that begins now; return its history.

    Parameters
    ----------
    folder : Path
        Of the metrics.
    saved : mapping or None
        The ``resumed`` and ``positions`` of the checkpoint that the run goes on from; None for a new run.
    num_learners : int
        See `write_view`.
    learners_per_rank : int
        See `write_view`.
    """
    segments: list[Positions] = []
    if saved is not None:
        given = [[_rows(rows) for rows in positions] for positions in (*saved["resumed"], saved["positions"])]
        segments = continued(folder, given[:-1], given[-1])
    elif num_segments(folder):
        segments = continued(folder, [], [_rows({})] * num_learners)
    write_view(folder, num_learners, segments, learners_per_rank)
    return segments


def _rows(given: Mapping[str, int]) -> dict[str, int]:
    """Return the rows of every table; a table that is absent has none."""
    rows = {group: given.get(group, 0) for group in COLUMNS}
    if not all(type(number) is int and number >= 0 for number in rows.values()):
        raise ValueError("rows of metrics that are no numbers")
    if LEARNERS_PER_RANK in given:
        rows[LEARNERS_PER_RANK] = given[LEARNERS_PER_RANK]
        if not (type(rows[LEARNERS_PER_RANK]) is int and rows[LEARNERS_PER_RANK] > 0):
            raise ValueError(f"metrics of {rows[LEARNERS_PER_RANK]} learners per rank")
    return rows


def _layout(name: str, dtype: str, starts: Sequence[Sequence[int]], in_files: Sequence[int]) -> h5py.VirtualLayout:
    """Return one column of the view: each segment up to the start of the next, the last one as it grows.

    A file of segment s holds `in_files[s]` learners.
    """
    learners, unlimited = len(starts[0]), h5py.h5s.UNLIMITED
    layout = h5py.VirtualLayout(shape=(learners, 1 + max(map(max, starts))), maxshape=(learners, None), dtype=dtype)
    for segment, (begins, in_file) in enumerate(zip(starts, in_files, strict=True)):
        for learner, start in enumerate(begins):
            source = partial(_source, learner, in_file, segment, name, dtype)
            if segment + 1 == len(starts):
                layout[learner, start:unlimited] = source(1, unlimited)
            elif length := starts[segment + 1][learner] - start:
                layout[learner, start : start + length] = source(length, length)
    return layout


def _source(learner: int, in_file: int, segment: int, name: str, dtype: str, length: int, stop: Any) -> Any:
    """Return the first rows of a learner's column, up to `stop`, in a file of `in_file` learners and `length` rows."""
    rank, row = divmod(learner, in_file)
    source = partial(h5py.VirtualSource, file_name(rank, segment), name, dtype=dtype)
    if in_file == 1:
        return source(shape=(length,), maxshape=(None,))[0:stop]
    return source(shape=(in_file, length), maxshape=(in_file, None))[row, 0:stop]


def read_view(folder: Path, group: str) -> dict[str, NDArray[Any]]:
    """Return the columns of a table from ``all.h5``, each of shape (learners, rows).

    A row that is just being written, and is not in every column yet, is left out. A column that the run did not record
    has only missing values.

    Parameters
    ----------
    folder : Path
        Of the metrics.
    group : str
        The table, a key of `COLUMNS`.
    """
    # SWMR only if needed: as a reader beside a writer, HDF5 retries for minutes on a damaged file.
    names = [VIEW, *(file_name(rank, segment) for rank, segment in rank_files(folder))]
    states = [_is_open(folder / name) for name in names]  # all of them are looked at: HDF5 would wait for a pipe
    with h5py.File(folder / VIEW, "r", swmr=any(states)) as file:
        format_version.check(int(file.attrs.get("format", format_version.FIRST)), FORMAT)
        columns = {name: file[group][name][...] for name in COLUMNS[group] if name in file[group]}
    rows = min(values.shape[1] for values in columns.values())
    learners = max(map(len, columns.values()))
    return {
        name: columns[name][:, :rows] if name in columns else np.full((learners, rows), column.missing, column.dtype)
        for name, column in COLUMNS[group].items()
    }


def read_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a rank's file, also while it is written."""
    with h5py.File(path, "r", swmr=_is_open(path)) as file:
        return dict(file.attrs)


def _is_open(path: Path) -> bool:
    """Return whether the file is open for writing, or was when its writer was killed. `OSError` if it is no file."""
    with files.open_file(path) as file:
        superblock = file.read(12)  # signature and version (9 bytes), two sizes, consistency flags
    return superblock[:9] == b"\x89HDF\r\n\x1a\n\x03" and superblock[11:] > b"\0"
