"""A run as a whole: its length, mini-batches, numbers, devices and folder."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, integer, not_empty, number, option


@dataclass(frozen=True)
class RunOptions(Section):
    """The length of the run, its mini-batches, number types, devices and folder."""

    title = "run"

    epochs: int | None = option(None, "passes over the training set; unset: 20, unless --steps is given", integer(1))
    steps: int | None = option(None, "steps of every learner, instead of --epochs", integer(1))
    batch_size: int = option(16, "samples per learner and step", integer(1))
    drop_last: bool = option(False, "leave an epoch's last mini-batch out where it would be smaller than the others")
    test_batch_size: int = option(256, "samples at a time in evaluations, per learner", integer(1))
    seed: int = option(0, "seed of initial parameters, shuffles and learners", integer(0, 2**63 - 1))
    dtype: str = option("float32", "type of parameters and inputs", choices=("float32", "float64"))
    precision: str = option(
        "full", "bf16, fp16: forward and backward in mixed precision", choices=("full", "bf16", "fp16")
    )
    channels_last: bool = option(False, "keep images and convolutions in channels-last order")
    compile: bool = option(False, "compile the model with torch.compile")
    stacked_randomness: str = option(
        "exact",
        "random layers, such as dropout, of a rank with several learners: exact: each learner draws what it would draw"
        " on a rank of its own, one after the other; fast: all together, other numbers",
        choices=("exact", "fast"),
    )
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "torch threads per rank; unset: its share of the node's cores", integer(1, 1024))
    loader_threads: int | None = option(
        None,
        "threads per rank that prepare mini-batches ahead; unset: 4 where a GPU computes, else 0",
        integer(0, 1024),
    )
    output: str | None = option(
        None, "the run's folder; unset: runs/TASK-ALGORITHM-TIME", not_empty("the name of a folder")
    )
    flush_seconds: float = option(
        2.0, "seconds between flushes of the metrics files", number(lambda s: s >= 0, "a number of at least 0")
    )
    expect_ranks: int | None = option(None, "refuse to run on another number of ranks", integer(1))
    intended_learners: int | None = option(
        None,
        "learners that the other options are meant for; another number of them gets a warning",
        integer(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("precision", self.precision == "full" or self.dtype == "float32", "full with dtype float64")
        self.require("steps", self.epochs is None or self.steps is None, "unset where epochs is given")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 20)
