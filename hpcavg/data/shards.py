"""Images in shards: files of decoded pixels that many ranks map and read in parallel.

A folder holds ``meta.json`` and, for each part (``train`` and ``val``), an index and shards. The index ``PART.npy`` has
a row of type `ROW` for each image. A shard ``PART-00000.bin`` holds `MAGIC`, then the pixels of one image after the
other: red, green and blue of each pixel, row by row.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError, reading, reason
from hpcavg.utils.files import FileRecord, read_small

META, FORMAT, VERSION = "meta.json", "hpcavg images", 1
MAGIC = b"hpcavg images 1\n"
PARTS = ("train", "val")
_PREPARE = "python -m hpcavg data prepare imagenet --data-dir"
ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i8")])
"""An image: the number of its shard, the offset of its first byte there, its size in pixels, its class."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Meta:
    """The contents of ``meta.json`` in a finished folder.

    Attributes
    ----------
    size : the shorter side of every image in pixels.
    classes : the names of the classes.
    num_images : by part.
    shards : the files, by part.
    """

    size: int
    classes: list[str]
    num_images: dict[str, int]
    shards: dict[str, list[FileRecord]]


def shard_name(part: str, number: int) -> str:
    """Return the file name of a shard of `part`."""
    return f"{part}-{number:05d}.bin"


def index_name(part: str) -> str:
    """Return the file name of the index of `part`."""
    return f"{part}.npy"


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of the ``meta.json`` file `path`; raise `InputError` for another format or version."""
    try:
        values = json.loads(read_small(path))
        found = (values["format"], values["version"]) if isinstance(values, dict) else type(values).__name__
    except OSError as error:
        raise _wrong(path, f"a file that can be read: {reason(error)}") from error
    except (ValueError, KeyError) as error:
        raise _wrong(path, f"a file of {FORMAT}, version {VERSION}; it is something else or damaged") from error
    if found != (FORMAT, VERSION):
        raise _wrong(path, f"a file of {FORMAT}, version {VERSION}; it says {found}")
    return values


def read_meta(folder: Path) -> Meta:
    """Return the contents of ``meta.json`` in `folder`; raise `InputError` if the folder is not finished."""
    values = read_json(folder / META)
    if "parts" not in values:
        raise _wrong(folder / META, "that of a finished folder: start `python -m hpcavg data prepare imagenet` again")
    try:
        return Meta(
            values["settings"]["size"],
            [str(name) for name in values["settings"]["classes"]],
            {part: int(values["parts"][part]["images"]) for part in PARTS},
            {part: [FileRecord(**shard) for shard in values["parts"][part]["shards"]] for part in PARTS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _wrong(folder / META, "whole; what it should say of parts and shards is damaged") from error


def find(data_dir: str | None) -> Path:
    """Return the folder with the shards: `data_dir` or ``prepared`` in it. Raise `InputError` if there are none."""
    if data_dir is None:
        raise InputError("data_dir", "unset", f"the folder that `{_PREPARE} FOLDER` has prepared")
    given = Path(data_dir)
    with reading("data_dir", data_dir):
        for folder in (given, given / "prepared"):
            if (folder / META).is_file():
                return folder
        if any((given / part).is_dir() for part in PARTS):
            raise InputError("data_dir", data_dir, f"prepared first: run `{_PREPARE} {data_dir}`")
    allowed = f"a folder with {META}, or prepared/{META}, that `{_PREPARE} FOLDER` has written"
    raise InputError("data_dir", data_dir, allowed)


def check(folder: Path) -> None:
    """Raise `InputError` for the first file that is missing or has another size or format."""
    meta = read_meta(folder)
    for part in PARTS:
        for shard in meta.shards[part]:
            _check_shard(folder / shard.name, shard.num_bytes)
        check_index(folder / index_name(part), meta, part)


def read_index(path: Path) -> NDArray[np.void]:
    """Return the index file `path`, mapped into memory; raise `InputError` if it is damaged."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise _wrong(path, f"a file that can be read: {reason(error)}") from error
    except (ValueError, EOFError) as error:
        raise _wrong(path, "a whole NumPy file; it is truncated or something else") from error
    if not isinstance(rows, np.ndarray) or rows.dtype != ROW or rows.ndim != 1:
        raise _wrong(path, f"rows of {', '.join(ROW.names or ())}")
    return rows


class ShardedImages:
    """The images of one part of a folder. Files are mapped when they are first used. A pickle of it is small."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self._rows = read_index(folder / index_name(part))
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: NDArray[np.int64]) -> list[Image]:
        """Return images, each of shape (height, width, 3), as read-only views of the files."""
        places = [(self._map(int(row["shard"])), row) for row in self._rows[index]]
        for pages, row in places:  # request all images from the disk before the first is read
            start = int(row["offset"]) // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, start, int(row["offset"]) - start + _num_bytes(row))
        return [
            np.frombuffer(pages, np.uint8, _num_bytes(row), int(row["offset"])).reshape(row["height"], row["width"], 3)
            for pages, row in places
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "part": self._part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ShardedImages.__init__(self, **state)

    def _map(self, number: int) -> mmap.mmap:
        if number not in self._maps:
            with open(self._folder / shard_name(self._part, number), "rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[number]


def _num_bytes(row: np.void) -> int:
    return int(row["height"]) * int(row["width"]) * 3


def _check_shard(path: Path, num_bytes: int) -> None:
    try:
        found = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise _wrong(path, f"a shard of {num_bytes} bytes: {reason(error)}") from error
    if found != num_bytes:
        raise _wrong(path, f"a shard of {num_bytes} bytes, not {found}; to repair it, prepare again")
    if magic != MAGIC:
        raise _wrong(path, f"a shard, which begins with {MAGIC!r}, not {magic!r}")


def check_index(path: Path, meta: Meta, part: str) -> None:
    """Raise `InputError` if the index file `path` does not match the images and shards of `part` in `meta`."""
    rows = read_index(path)
    if len(rows) != meta.num_images[part]:
        raise _wrong(path, f"the index of {meta.num_images[part]} images, not {len(rows)}")
    ends = np.array([shard.num_bytes for shard in meta.shards[part]], np.int64)
    in_range = (rows["shard"] >= 0) & (rows["shard"] < len(ends)) & (rows["height"] > 0) & (rows["width"] > 0)
    if not in_range.all() or not (rows["offset"] >= len(MAGIC)).all():
        raise _wrong(path, "an index of what is in the shards; it is damaged")
    if (rows["offset"] + rows["height"].astype(np.int64) * rows["width"] * 3 > ends[rows["shard"]]).any():
        raise _wrong(path, "an index of what is in the shards; it is damaged")
    if not ((rows["label"] >= 0) & (rows["label"] < len(meta.classes))).all():
        raise _wrong(path, f"an index with labels of {len(meta.classes)} classes; it is damaged")


def _wrong(path: Path, allowed: str) -> InputError:
    return InputError("data_dir", path, allowed)
