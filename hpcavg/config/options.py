"""A run's configuration: every option with its default, unit and check. Frozen; light to import.

The command line, TOML files and the resolved ``config.toml`` of a run are all made from the fields of `Config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcavg import algorithms, models
from hpcavg.algorithms import catalogue
from hpcavg.algorithms.rule import Rule
from hpcavg.errors import InputError, require_integer


def _option(default: Any, section: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"section": section, "help": help, "choices": choices})


def _averaging(name: str) -> Any:
    """Return the field of an algorithm's argument; None leaves it to the algorithm."""
    return _option(None, _AVERAGING, catalogue.option_help(name))


CONFIG_FILE, CHECKPOINTS = "config.toml", "checkpoints"
ENGINES = ("auto", "mpi", "shared", "twolevel", "staged", "cuda-aware", "cuda-ipc")
BUILT_IN_TASKS = ("digits", "synthetic", "cifar10", "epsilon", "imagenet")
UNSET = "unset"
"""The value that means None, for the command line to take back what a file sets."""
_AVERAGING, _TASK, _OPTIMIZER, _RUN, _FAULTS = "averaging", "task", "optimizer", "run", "checkpoints and faults"


@dataclass(frozen=True)
class Config:
    """All options of a training run. None means: decided by the algorithm, the run length or the machine.

    Raises `InputError` naming the option, its value and what is allowed.
    """

    algorithm: str = _option("hier_avg", _AVERAGING, "averaging algorithm", tuple(algorithms.ALGORITHMS))
    k: int | None = _averaging("k")
    k1: int | None = _averaging("k1")
    k2: int | None = _averaging("k2")
    interval: int | None = _averaging("interval")
    local_steps: tuple[int, ...] | str | None = _averaging("local_steps")
    base_steps: int | None = _averaging("base_steps")
    epoch_seconds: float | None = _averaging("epoch_seconds")
    tau: int | str | None = _averaging("tau")
    delay: int | None = _averaging("delay")
    xi: float | None = _averaging("xi")
    tau0: int | None = _averaging("tau0")
    growth: str | None = _averaging("growth")
    alpha: float | None = _averaging("alpha")
    rounds: int | None = _averaging("rounds")
    mu: float | None = _averaging("mu")
    shift: float | None = _averaging("shift")
    switch_step: int | None = _averaging("switch_step")
    variant: str | None = _averaging("variant")
    beta: float | None = _averaging("beta")
    h: int | None = _averaging("h")
    outer_lr: float | None = _averaging("outer_lr")
    outer_momentum: float | None = _averaging("outer_momentum")
    n_push: int | None = _averaging("n_push")
    n_fetch: int | None = _averaging("n_fetch")
    num_servers: int | None = _option(
        None, _AVERAGING, "ranks that serve parameters, of the last; unset: 1 where the algorithm has a server"
    )
    group_size: int | None = _option(None, _AVERAGING, "ranks in a local group; unset: the ranks of a node")
    buffers: str = _option("average", _AVERAGING, "BatchNorm statistics at a mean", ("average", "keep", "recompute"))
    optimizer_state: str = _option("keep", _AVERAGING, "momentum at a global mean", ("keep", "average", "reset"))
    engine: str = _option("auto", _AVERAGING, "how means are taken", ENGINES)
    wire_dtype: str | None = _option(
        None,
        _AVERAGING,
        "bfloat16 or float16: what differences from the last mean cross nodes as; unset: they cross as they are",
    )
    error_feedback: bool = _option(False, _AVERAGING, "add what --wire-dtype rounds away to the next difference")
    non_finite: str = _option(
        "exclude",
        _AVERAGING,
        "learners with non-finite parameters: exclude them from the mean and give it to them, or stop the run",
        ("exclude", "stop"),
    )
    check_rounds: int = _option(
        0, _AVERAGING, "compare what learners must hold alike after every so many global means; 0: never"
    )
    consensus_distance: bool = _option(
        False, _AVERAGING, "measure how far learners are apart also at means that replace, for the price of a copy"
    )

    task: str = _option("digits", _TASK, f"{', '.join(BUILT_IN_TASKS)}, or path/to/file.py:function")
    model: str = _option("cnn", _TASK, "network of the built-in tasks", tuple(models.NETWORKS))
    partition: str = _option(
        "shard",
        _TASK,
        "shard: disjoint parts, dealt anew every epoch; shared: all sample the whole set; dirichlet: disjoint parts,"
        " the same in every epoch, with skewed labels; by-class: the same, of few classes each",
        ("shard", "shared", "dirichlet", "by-class"),
    )
    dirichlet_alpha: float = _option(
        0.5, _TASK, "the smaller, the more unequal the learners' labels with --partition dirichlet"
    )
    data_dir: str | None = _option(None, _TASK, "folder of the data of cifar10, epsilon or imagenet")
    augment: bool = _option(True, _TASK, "crop and flip training images of cifar10 and imagenet at random")
    crop_size: int = _option(224, _TASK, "pixels of a side of the crops of imagenet")
    image_shape: tuple[int, ...] = _option(
        (3, 32, 32), _TASK, "channels x height x width of synthetic images, as 3x32x32"
    )
    num_classes: int = _option(10, _TASK, "classes of synthetic images")
    num_samples: int = _option(10_000, _TASK, "synthetic training images")

    optimizer: str = _option("sgd", _OPTIMIZER, "local optimizer", ("sgd", "adam", "adamw"))
    learning_rate: float = _option(0.05, _OPTIMIZER, "learning rate at its highest")
    momentum: float = _option(0.9, _OPTIMIZER, catalogue.OPTIONS["momentum"])
    nesterov: bool = _option(False, _OPTIMIZER, "Nesterov's momentum")
    weight_decay: float = _option(1e-4, _OPTIMIZER, "weight decay; the L2 term of logistic regression")
    clip_norm: float | None = _option(None, _OPTIMIZER, "gradient norm above which gradients are scaled down to it")
    label_smoothing: float = _option(0.0, _OPTIMIZER, "part of a target spread over all classes while training")
    schedule: str = _option(
        "constant", _OPTIMIZER, "learning rate over the run", ("constant", "step", "cosine", "one-cycle")
    )
    decay_steps: int | None = _option(None, _OPTIMIZER, "steps between decays (step); unset: a third of the run")
    decay_epochs: tuple[int, ...] | None = _option(
        None, _OPTIMIZER, "epochs after which to decay (step), as 150,275; instead of --decay-steps"
    )
    decay_factor: float = _option(0.1, _OPTIMIZER, "factor of each decay (step)")
    cycle_peak: float = _option(0.3, _OPTIMIZER, "part of the run after which the rate is at its highest (one-cycle)")
    cycle_start: float = _option(0.04, _OPTIMIZER, "rate at the start, as a part of the highest (one-cycle)")
    cycle_end: float = _option(4e-6, _OPTIMIZER, "rate at the end, as a part of the highest (one-cycle)")
    cycle_shape: str = _option("cosine", _OPTIMIZER, "how the rate rises and falls (one-cycle)", ("cosine", "linear"))
    warmup_steps: int = _option(0, _OPTIMIZER, "steps of linear warm-up from a hundredth of the rate")

    epochs: int | None = _option(None, _RUN, "passes over the training set; unset: 20, unless --steps is given")
    steps: int | None = _option(None, _RUN, "steps of every learner, instead of --epochs")
    batch_size: int = _option(16, _RUN, "samples per learner and step")
    drop_last: bool = _option(
        False, _RUN, "leave an epoch's last mini-batch out where it would be smaller than the others"
    )
    test_batch_size: int = _option(256, _RUN, "samples at a time in evaluations, per learner")
    seed: int = _option(0, _RUN, "seed of initial parameters, shuffles and learners")
    dtype: str = _option("float32", _RUN, "type of parameters and inputs", ("float32", "float64"))
    precision: str = _option(
        "full", _RUN, "bf16, fp16: forward and backward in mixed precision", ("full", "bf16", "fp16")
    )
    channels_last: bool = _option(False, _RUN, "keep images and convolutions in channels-last order")
    compile: bool = _option(False, _RUN, "compile the model with torch.compile")
    device: str = _option("auto", _RUN, "auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    threads: int | None = _option(None, _RUN, "torch threads per rank; unset: its share of the node's cores")
    loader_threads: int | None = _option(
        None, _RUN, "threads per rank that prepare mini-batches ahead; unset: 4 where a GPU computes, else 0"
    )
    output: str | None = _option(None, _RUN, "the run's folder; unset: runs/TASK-ALGORITHM-TIME")
    flush_seconds: float = _option(2.0, _RUN, "seconds between flushes of the metrics files")
    expect_ranks: int | None = _option(None, _RUN, "refuse to run on another number of ranks")
    intended_learners: int | None = _option(
        None, _RUN, "learners that the other options are meant for; another number of them gets a warning"
    )

    resume: str | None = _option(
        None, _FAULTS, "a run's folder, or a checkpoint, to go on from; auto: the newest good one in --output, if any"
    )
    checkpoint_steps: int | None = _option(None, _FAULTS, "steps between checkpoints")
    checkpoint_minutes: float = _option(30.0, _FAULTS, "minutes between checkpoints; 0: none by the clock")
    keep_checkpoints: int = _option(2, _FAULTS, "checkpoints to keep, of the newest")
    stop_after: float | None = _option(None, _FAULTS, "seconds after which to write a checkpoint and stop")
    stop_margin: float = _option(120.0, _FAULTS, "seconds to do so before the end of a Slurm job")
    on_failure: str = _option(
        "abort",
        _FAULTS,
        "when a rank dies or hangs: abort the job; restart: the same, with the exit status that asks for it; shrink: go"
        " on with the others (mpirun --with-ft ulfm)",
        ("abort", "restart", "shrink"),
    )
    hang_timeout: float = _option(600.0, _FAULTS, "seconds to wait for ranks in a mean before they hang; 0: for ever")

    def __post_init__(self) -> None:
        hints = _hints()
        for field in dataclasses.fields(self):
            value = _coerced(field.name, getattr(self, field.name), hints[field.name])
            choices = field.metadata["choices"]
            if choices is not None:
                value = _chosen(field.name, value, choices)
            object.__setattr__(self, field.name, value)
        positive = ("group_size", "decay_steps", "epochs", "steps", "expect_ranks", "intended_learners")
        for name in (*positive, "checkpoint_steps"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 1)
        for name in ("num_samples", "batch_size", "test_batch_size", "keep_checkpoints"):
            require_integer(name, getattr(self, name), 1)
        if self.threads is not None:
            require_integer("threads", self.threads, 1, 1024)
        require_integer("crop_size", self.crop_size, 1, 4096)
        if self.loader_threads is not None:
            require_integer("loader_threads", self.loader_threads, 0, 1024)
        require_integer("num_classes", self.num_classes, 2)
        require_integer("warmup_steps", self.warmup_steps, 0)
        require_integer("check_rounds", self.check_rounds, 0)
        require_integer("seed", self.seed, 0, 2**63 - 1)
        self._require("learning_rate", 0 < self.learning_rate < 1e30, "a positive number below 1e30")
        self._require("momentum", 0 <= self.momentum < 1, "a number of at least 0 and below 1")
        # AdamW multiplies it by the rate: the product, too, must be one that float32 can hold.
        self._require("weight_decay", 0 <= self.weight_decay < 1e8, "a number of at least 0 and below 1e8")
        for name in ("decay_factor", "cycle_start", "cycle_end"):
            self._require(name, 0 < getattr(self, name) <= 1, "a number above 0 and at most 1")
        self._require("cycle_peak", 0 < self.cycle_peak < 1, "a number above 0 and below 1")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "a number of at least 0 and below 1")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number")
        self._require("dirichlet_alpha", 0 < self.dirichlet_alpha < 1e30, "a positive number below 1e30")
        rising = self.decay_epochs is None or (0, *self.decay_epochs) == tuple(sorted({0, *self.decay_epochs}))
        self._require("decay_epochs", rising and self.decay_epochs != (), "rising epochs of at least 1, as 150,275")
        both = self.decay_steps is not None and self.decay_epochs is not None
        self._require("decay_epochs", not both, "unset where --decay-steps is given")
        for name in ("decay_steps", "decay_epochs"):  # else the rate would stay, unnoticed
            decays = self.schedule == "step" or getattr(self, name) is None
            self._require(name, decays, f"unset with --schedule {self.schedule}, or with --schedule step")
        self._require("precision", self.precision == "full" or self.dtype == "float32", "full with dtype float64")
        for name in ("flush_seconds", "checkpoint_minutes", "stop_margin", "hang_timeout"):
            self._require(name, getattr(self, name) >= 0, "a number of at least 0")
        self._require("stop_after", self.stop_after is None or self.stop_after > 0, "a positive number of seconds")
        self._require("resume", self.resume != "auto" or self.output is not None, "a path, or auto with --output")
        self._require("nesterov", not self.nesterov or self.momentum > 0, "false where momentum is 0")
        shape = self.image_shape
        self._require("image_shape", len(shape) == 3 and min(shape) >= 1, "channels x height x width, as 3x32x32")
        self._require("output", self.output != "", "the name of a folder")
        self._require("data_dir", self.data_dir != "", "the name of a folder")
        if self.data_dir is not None:  # absolute, as the task below
            object.__setattr__(self, "data_dir", str(Path(self.data_dir).absolute()))
        self._check_task()
        if self.epochs is not None and self.steps is not None:
            raise InputError("steps", self.steps, "unset where epochs is given")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 20)
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        """Check what the algorithm asks of other options, and resolve its own."""
        rule = self.rule()
        if self.wire_dtype is not None:
            object.__setattr__(self, "wire_dtype", _chosen("wire_dtype", self.wire_dtype, ("bfloat16", "float16")))
        has_effect = self.wire_dtype is not None
        self._require("error_feedback", has_effect or not self.error_feedback, "false without wire_dtype")
        label = self.algorithm.replace("_", "-")
        for name, value in {**rule.options, **rule.optimizer}.items():
            object.__setattr__(self, name, value)
        self._require("optimizer", not rule.optimizer or self.optimizer == "sgd", f"sgd for {label}")
        if rule.rate is not None:
            self._require("schedule", self.schedule == "constant", f"constant: {label} sets the learning rate")
            self._require("warmup_steps", self.warmup_steps == 0, f"0: {label} sets the learning rate")
        self._require("check_rounds", rule.server is None or not self.check_rounds, f"0 for {label}")
        if self.num_servers is not None:
            require_integer("num_servers", self.num_servers, 0 if rule.server is None else 1)
            self._require("num_servers", rule.server is not None or not self.num_servers, f"0 for {label}")
        if rule.server is not None:
            why = f"{label}, whose servers' state is in no checkpoint"
            self._require("resume", self.resume is None, f"unset for {why}")
            self._require("checkpoint_steps", self.checkpoint_steps is None, f"unset for {why}")
            self._require("on_failure", self.on_failure == "abort", f"abort for {why}")

    @property
    def servers(self) -> int:
        """Ranks that serve parameters instead of learning."""
        return self.num_servers or int(self.rule().server is not None)

    def _check_task(self) -> None:
        if self.task in BUILT_IN_TASKS:
            return
        path, separator, function = self.task.rpartition(":")
        is_python = bool(separator) and path.endswith(".py")
        self._require("task", is_python, f"one of {', '.join(BUILT_IN_TASKS)}, or path/to/file.py:function")
        try:
            exists = Path(path).is_file()
        except OSError:  # a name too long, a folder that may not be searched
            exists = False
        self._require("task", exists, "a file that exists, as path/to/file.py:function")
        # Absolute, so that a run's config.toml can be given back from anywhere.
        object.__setattr__(self, "task", f"{Path(path).resolve()}:{function}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, name)
            sign = "x" if name == "image_shape" else ","
            raise InputError(name, sign.join(map(str, value)) if isinstance(value, tuple) else value, allowed)

    def rule(self) -> Rule:
        """Return the averaging rule that the options describe."""
        own = algorithms.option_names(self.algorithm)
        given = {name: getattr(self, name) for name in {*algorithm_options(), *own}}
        return algorithms.build(self.algorithm, {name: value for name, value in given.items() if value is not None})

    def as_toml(self) -> dict[str, Any]:
        """Return the options that are set, as a TOML file holds them."""
        values = dataclasses.asdict(self)
        values["image_shape"] = "x".join(map(str, self.image_shape))
        return {name: value for name, value in values.items() if value is not None}


@functools.cache
def _hints() -> dict[str, Any]:
    """Return the types of the fields of `Config`; they cost milliseconds to find out."""
    return typing.get_type_hints(Config)


def algorithm_options() -> set[str]:
    """Return the options that are arguments of algorithms and nothing else."""
    sections = {field.name: field.metadata["section"] for field in dataclasses.fields(Config)}
    return {name for name in algorithms.all_option_names() if sections[name] == _AVERAGING}


def underscored(name: Any) -> str:
    """Return an option's name as `Config` spells it; anything but a text has none."""
    return name.replace("-", "_") if isinstance(name, str) else ""


def _chosen(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the choice that `value` names; dashes and underscores are the same."""
    for choice in choices:
        if value.replace("_", "-") == choice.replace("_", "-"):
            return choice
    raise InputError(name, value, f"one of {', '.join(choice.replace('_', '-') for choice in choices)}")


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type the field declares, from a string (command line) or a TOML value."""
    kinds = _kinds(hint)
    if (value is None or value == UNSET) and type(None) in kinds:
        return None
    for kind in kinds:
        with contextlib.suppress(TypeError, ValueError, AttributeError, OverflowError):
            return _read(value, kind)
    words = {bool: "true or false", str: "a text", int: "an integer below 2^63", float: "a finite number"}
    several = "sizes such as 3x32x32" if name == "image_shape" else "integers such as 4,2,1"
    raise InputError(name, value, words.get(kinds[0], several))


def _read(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`; raises where it is something else."""
    if typing.get_origin(kind) is tuple:
        parts = re.split("[x,]", value) if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)):
            return tuple(_read(part, int) for part in parts)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        value.encode()  # raises for what is no Unicode, such as the bytes of a file's name in another encoding
        if "\0" not in value:
            return value
    elif not isinstance(value, bool) and not (kind is int and isinstance(value, float)) and math.isfinite(kind(value)):
        number = kind(value)
        if kind is float or abs(number) < 2**63:
            return number
    raise TypeError(value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union of types, or the type alone."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)
