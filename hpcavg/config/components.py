"""The built-in engines, tasks and data sets: each is registered here, once. Light to import: no torch, no MPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HostEngine:
    """An engine for parameters in host memory.

    Attributes
    ----------
    maker : its class, as ``module:name``.
    text : what it does, in one line.
    """

    maker: str
    text: str


HOST_ENGINES = {
    "mpi": HostEngine("hpcavg.engines.mpi:MpiEngine", "one Allreduce by MPI; the reference"),
    "shared": HostEngine(
        "hpcavg.engines.shared:SharedEngine", "memory that all ranks of a node share; for learners on one node"
    ),
    "twolevel": HostEngine(
        "hpcavg.engines.twolevel:TwoLevelEngine",
        "shared memory inside each node, messages between nodes; can compress these (--wire-dtype)",
    ),
}

DEVICE_ENGINES = {
    "nccl": "sums in device memory by NCCL; every rank needs a GPU of its own",
    "cuda-aware": "gives device memory to MPI, which must be CUDA-aware",
    "staged": "copies parameters on a GPU to host memory, where another engine takes the mean",
}
"""Engines for parameters on a GPU, each with what it does."""

FORMER_ENGINES = ("cuda-ipc",)
"""Engines of earlier versions. A file that names one, such as a run's ``config.toml``, means ``auto``."""

ENGINES = {
    "auto": "the best one for the nodes and devices of the ranks",
    **{name: engine.text for name, engine in HOST_ENGINES.items()},
    **DEVICE_ENGINES,
}
"""All that ``--engine`` takes, each with what it does."""

TASKS = {
    "digits": "1797 handwritten digits of 8x8 pixels, which scikit-learn carries",
    "synthetic": "synthetic images of any shape and number of classes",
    "mnist1d": "MNIST-1D, signals of 40 values in ten classes, which the package mnist1d makes",
    "made-up-epsilon": "made-up samples of epsilon's form, 2000 features and two classes",
    "cifar10": "CIFAR-10, from --data-dir",
    "epsilon": "epsilon, 2000 features and two classes, from --data-dir",
    "imagenet": "ImageNet-1K, prepared, from --data-dir",
}
"""Tasks by name. Task ``x-y`` is made by ``hpcavg.tasks.x_y.task``."""

DATASETS = {
    "cifar10": ("synthesize",),
    "epsilon": ("prepare", "synthesize"),
    "imagenet": ("prepare", "check", "synthesize"),
}
"""Data sets by name, and the actions of the command ``data`` that each has. Module ``hpcavg.data.x`` has the rest."""


def describe(components: Mapping[str, str]) -> str:
    """Return a list of names and texts, one line each."""
    width = max(map(len, components))
    return "\n".join(f"{name:{width}}  {text}" for name, text in components.items())
