"""What is learned: the task, its network, its data and how learners share these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpcavg import models
from hpcavg.config.components import TASKS
from hpcavg.config.section import Section, integer, not_empty, number, option
from hpcavg.errors import InputError

# Other tasks than synthetic keep its number: former runs wrote it into their configuration.
_NUM_SAMPLES = {"mnist1d": 40_000, "made-up-epsilon": 4_000}


@dataclass(frozen=True)
class ProblemOptions(Section):
    """The task, its network and its data. Paths become absolute: a run's config.toml can be used from any folder."""

    title = "task"

    task: str = option("digits", f"{', '.join(TASKS)}, or path/to/file.py:function")
    model: str = option("cnn", "network of the built-in tasks", choices=tuple(models.NETWORKS))
    partition: str = option(
        "shard",
        "shard: disjoint parts, dealt anew every epoch; shared: all sample the whole set; dirichlet: disjoint parts,"
        " the same in every epoch, with skewed labels; by-class: the same, of few classes each",
        choices=("shard", "shared", "dirichlet", "by-class"),
    )
    dirichlet_alpha: float = option(
        0.5,
        "the smaller, the more unequal the learners' labels with --partition dirichlet",
        number(lambda alpha: 0 < alpha < 1e30, "a positive number below 1e30"),
    )
    data_dir: str | None = option(
        None, "folder of the data of cifar10, epsilon or imagenet", not_empty("the name of a folder")
    )
    augment: bool = option(True, "crop and flip training images of cifar10 and imagenet at random")
    crop_size: int = option(224, "pixels of a side of the crops of imagenet", integer(1, 4096))
    image_shape: tuple[int, int, int] = option((3, 32, 32), "channels x height x width of synthetic images, as 3x32x32")
    num_classes: int = option(10, "classes of synthetic images", integer(2))
    num_samples: int | None = option(
        None,
        "training samples of synthetic, mnist1d and made-up-epsilon; unset: 10000, 40000 and 4000",
        integer(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.image_shape
        if len(shape) != 3 or min(shape) < 1:
            raise InputError("image_shape", "x".join(map(str, shape)), "channels x height x width, as 3x32x32")
        if self.num_samples is None:
            object.__setattr__(self, "num_samples", _NUM_SAMPLES.get(self.task, 10_000))
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", str(Path(self.data_dir).absolute()))
        if self.task not in TASKS:
            object.__setattr__(self, "task", self._absolute_task())

    def _absolute_task(self) -> str:
        """Return the user's task with the absolute path of its file."""
        path, separator, function = self.task.rpartition(":")
        is_python = bool(separator) and path.endswith(".py")
        self.require("task", is_python, f"one of {', '.join(TASKS)}, or path/to/file.py:function")
        try:
            exists = Path(path).is_file()
        except OSError:  # a name too long, a folder that may not be searched
            exists = False
        self.require("task", exists, "a file that exists, as path/to/file.py:function")
        return f"{Path(path).resolve()}:{function}"
