"""A checkpoint's manifest: which files and parts it has, sealed with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpcavg.utils import format_version
from hpcavg.utils.files import FileRecord

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint. It is written last: a folder with a manifest is whole.

    Parameters
    ----------
    step : int
        The step at which the checkpoint was taken.
    num_ranks : int
        The number of learners. Each has a file of its own, and the number of a rank that holds one learner.
    files : list of FileRecord
        What `write_rank` returned, for every file.
    parts : list of dict
        For every learner and part, the learner whose file holds the part. Learners with equal parts name the same one.
    about : dict
        JSON values of the caller, for example the configuration.
    number : int
        Counts the checkpoints of the folder in the order of writing, from 1; `commit` sets it. The step gives no such
        order: a run that goes on with more ranks from an epoch's end has taken fewer steps.
    """

    step: int
    num_ranks: int
    files: list[FileRecord]
    parts: list[dict[str, int]]
    about: dict[str, Any]
    number: int = 0

    def __post_init__(self) -> None:
        ranks = range(self.num_ranks)
        places = [place for held in self.parts for place in held.values()]
        if not (0 < len(self.parts) == len(ranks) and all(type(place) is int and place in ranks for place in places)):
            raise ValueError("a manifest needs the parts of every rank, and the files that hold them")
        if [record.name for record in self.files] != [rank_file(rank) for rank in ranks]:
            raise ValueError("a manifest needs the files of all ranks, and no others")
        if not all(type(number) is int and number >= 0 for number in (self.step, self.number)):
            raise ValueError("a manifest needs its step and number")

    def to_json(self) -> str:
        """Return the text of the file: the values, and the SHA-256 of the text without it."""
        return _sealed({"format": _FORMAT, **asdict(self)})

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Return the manifest of this text. Raises `NewerFormatError`, or another exception if a byte has changed."""
        values = json.loads(data)
        format_version.check(values["format"], _FORMAT)
        del values["sha256"]
        if _sealed(values).encode() != data:
            raise ValueError("checksum")
        records = [FileRecord(**record) for record in values["files"]]
        return Manifest(
            values["step"], values["num_ranks"], records, values["parts"], values["about"], values["number"]
        )


def rank_file(rank: int) -> str:
    """Return the name of a learner's file, whose number is `rank`."""
    return f"rank-{rank:05d}.safetensors"


def _sealed(values: Mapping[str, Any]) -> str:
    """Return the text of a manifest: `values`, and the SHA-256 of their text."""
    return _json({**values, "sha256": hashlib.sha256(_json(values).encode()).hexdigest()})


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
