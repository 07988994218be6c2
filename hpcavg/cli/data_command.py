"""``python -m hpcavg data``: prepare data sets for training, check them, or write synthetic ones."""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcavg.errors import InputError, reason


def run(options: argparse.Namespace, connect: Callable[[], Any], rank: int) -> None:
    """Run the command. All ranks prepare and check imagenet; rank 0 alone does the rest.

    Parameters
    ----------
    options : argparse.Namespace
        The options, as ``cli.parsers.parse_data`` returns them.
    connect : callable
        Returns the communicator of all ranks. Nothing else starts MPI.
    rank : int
        This rank.

    Raises
    ------
    InputError
        The data cannot be read or written. For imagenet all ranks raise it.
    """
    folder = Path(options.data_dir)
    output = folder if getattr(options, "output", None) is None else Path(options.output)
    if options.action == "check":
        _module("imagenet").check(options.data_dir, connect())
        return
    try:
        if options.action == "prepare" and options.dataset == "imagenet":
            destination = folder / "prepared" if options.output is None else output
            _module("imagenet").prepare(folder, destination, options.size, connect())
        elif rank == 0 and options.action == "prepare":
            _prepare_epsilon(folder, output)
        elif rank == 0:
            _synthesize(options, folder)
    except OSError as error:
        name = "data_dir" if output == folder else "output"
        raise InputError(name, str(output), f"a folder that can be written ({reason(error)})") from error


def _prepare_epsilon(folder: Path, output: Path) -> None:
    epsilon = _module("epsilon")
    counts = epsilon.prepare(folder, output)
    print(f"{output / epsilon.FILE}: {_samples(counts)}")
    if counts != epsilon.NUM_SAMPLES:
        print(f"the original has {_samples(epsilon.NUM_SAMPLES)}")


def _samples(counts: dict[str, int]) -> str:
    return f"{counts['train']:,} training and {counts['test']:,} test samples"


def _synthesize(options: argparse.Namespace, folder: Path) -> None:
    more: tuple[Any, ...] = ()
    if options.dataset == "cifar10":
        more = (options.format or "binary",)
    elif options.dataset == "epsilon":
        more = (options.compress,)
    with _nothing_left(folder):
        _module(options.dataset).synthesize(folder, options.scale, options.seed, *more)
    print(f"{folder}: {options.dataset}, {options.scale:g} of the original's size, synthetic, seed {options.seed}")
    if options.dataset != "cifar10":
        print(f"next: python -m hpcavg data prepare {options.dataset} --data-dir {folder}")


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """If the work inside fails, remove what it has written to `folder`, and the folder if it is new."""
    before = set(folder.iterdir()) if folder.is_dir() else None
    try:
        yield
    except (OSError, InputError, KeyboardInterrupt):
        new = set(folder.iterdir()) - (before or set()) if folder.is_dir() else set()
        for path in new if before is not None else {folder}:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _module(dataset: str) -> Any:
    """Return the module of a data set. It is imported only if it is needed."""
    return importlib.import_module(f"hpcavg.data.{dataset}")
