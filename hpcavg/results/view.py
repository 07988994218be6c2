"""The metrics of all ranks as one: the segments of a resumed run, ``all.h5`` over their files, and reading it.

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

from hpcavg.results.columns import COLUMNS, FORMAT, fill_value
from hpcavg.utils import files, format_version

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
        file.attrs["format"] = FORMAT
        for group, columns in COLUMNS.items():
            rows = [[before[group] for before in segment] for segment in starts]
            for name, column in columns.items():
                layout = _layout(f"{group}/{name}", column.dtype, rows)
                dataset = file.create_virtual_dataset(f"{group}/{name}", layout, fillvalue=fill_value(column))
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
        format_version.check(int(file.attrs.get("format", format_version.FIRST)), FORMAT)
        columns = {name: file[group][name][...] for name in COLUMNS[group] if name in file[group]}
    rows = min(values.shape[1] for values in columns.values())
    ranks = max(map(len, columns.values()))
    return {
        name: columns[name][:, :rows] if name in columns else np.full((ranks, rows), column.missing, column.dtype)
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
