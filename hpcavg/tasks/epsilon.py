"""epsilon: 2000 features and two classes, mapped from the file that ``data prepare epsilon`` writes."""

from __future__ import annotations

from pathlib import Path

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data import epsilon
from hpcavg.data.mapped import MappedArray
from hpcavg.data.samples import Data
from hpcavg.errors import InputError, reading
from hpcavg.tasks.task import Task

NUM_CLASSES = 2


def task(config: Config) -> Task:
    """Return the task. ``--data-dir`` holds ``epsilon.h5``."""
    return Task(
        "epsilon",
        lambda: models.build(config.problem.model, (epsilon.NUM_FEATURES,), NUM_CLASSES),
        lambda: load_data(config.problem.data_dir),
    )


def load_data(folder: str | None) -> Data:
    """Return inputs of shape (n, 2000), float32, which stay in files, and targets: 0 (for -1) and 1.

    Raises `InputError` if the folder or its file cannot be used.
    """
    if folder is None:
        command = "python -m hpcavg data prepare epsilon --data-dir DIR"
        texts = " and ".join(f"{name}(.bz2)" for name in epsilon.TEXTS.values())
        allowed = f"a folder with {epsilon.FILE}, which {command} makes of {texts} from {epsilon.WHERE}"
        raise InputError("data_dir", "unset", allowed)
    with reading("data_dir", folder):
        found = epsilon.locate(Path(folder))
    inputs = {
        name: MappedArray(part.path, part.offset, (len(part.targets), epsilon.NUM_FEATURES), "<f4")
        for name, part in found.items()
    }
    return Data(inputs["train"], found["train"].targets, inputs["test"], found["test"].targets)
