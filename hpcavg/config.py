"""A run's configuration: every option with its default, unit and check. Frozen; light to import.

The command line, TOML files and the resolved ``config.toml`` of a run are all made from the fields of `Config`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcavg import algorithms, catalogue
from hpcavg.errors import InputError, require_integer
from hpcavg.rule import Rule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _option(default: Any, section: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"section": section, "help": help, "choices": choices})


def _averaging(name: str) -> Any:
    """Return the field of an algorithm's argument; None leaves it to the algorithm."""
    return _option(None, _AVERAGING, catalogue.option_help(name))


ENGINES = ("auto", "mpi", "shared", "twolevel", "staged", "cuda-aware", "cuda-ipc")
BUILT_IN_TASKS = ("digits", "synthetic")
_AVERAGING, _TASK, _OPTIMIZER, _RUN = "averaging", "task", "optimizer", "run"


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
    model: str = _option("cnn", _TASK, "network of the built-in tasks", ("mlp", "cnn"))
    partition: str = _option(
        "shard",
        _TASK,
        "shard: disjoint parts, reshuffled every epoch; shared: all sample the whole set",
        ("shard", "shared"),
    )
    image_shape: tuple[int, ...] = _option(
        (3, 32, 32), _TASK, "channels x height x width of synthetic images, as 3x32x32"
    )
    num_classes: int = _option(10, _TASK, "classes of synthetic images")
    num_samples: int = _option(10_000, _TASK, "synthetic training images")

    optimizer: str = _option("sgd", _OPTIMIZER, "local optimizer", ("sgd", "adam", "adamw"))
    learning_rate: float = _option(0.05, _OPTIMIZER, "learning rate at its highest")
    momentum: float = _option(0.9, _OPTIMIZER, catalogue.OPTIONS["momentum"])
    nesterov: bool = _option(False, _OPTIMIZER, "Nesterov's momentum")
    weight_decay: float = _option(1e-4, _OPTIMIZER, "weight decay")
    schedule: str = _option(
        "constant", _OPTIMIZER, "learning rate over the run", ("constant", "step", "cosine", "one-cycle")
    )
    decay_steps: int | None = _option(None, _OPTIMIZER, "steps between decays (step); unset: a third of the run")
    decay_factor: float = _option(0.1, _OPTIMIZER, "factor of each decay (step)")
    warmup_steps: int = _option(0, _OPTIMIZER, "steps of linear warm-up from a hundredth of the rate")

    epochs: int | None = _option(None, _RUN, "passes over the training set; unset: 20, unless --steps is given")
    steps: int | None = _option(None, _RUN, "steps of every learner, instead of --epochs")
    batch_size: int = _option(16, _RUN, "samples per learner and step")
    seed: int = _option(0, _RUN, "seed of initial parameters, shuffles and learners")
    dtype: str = _option("float32", _RUN, "type of parameters and inputs", ("float32", "float64"))
    device: str = _option("auto", _RUN, "auto takes a GPU where there is one", ("auto", "cpu", "cuda"))
    threads: int | None = _option(None, _RUN, "torch threads per rank; unset: its share of the node's cores")
    output: str | None = _option(None, _RUN, "the run's folder; unset: runs/TASK-ALGORITHM-TIME")
    flush_seconds: float = _option(2.0, _RUN, "seconds between flushes of the metrics files")
    expect_ranks: int | None = _option(None, _RUN, "refuse to run on another number of ranks")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerced(field.name, getattr(self, field.name), hints[field.name])
            choices = field.metadata["choices"]
            if choices is not None:
                value = _chosen(field.name, value, choices)
            object.__setattr__(self, field.name, value)
        for name in ("group_size", "decay_steps", "epochs", "steps", "expect_ranks"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), 1)
        for name in ("num_samples", "batch_size"):
            require_integer(name, getattr(self, name), 1)
        if self.threads is not None:
            require_integer("threads", self.threads, 1, 1024)
        require_integer("num_classes", self.num_classes, 2)
        require_integer("warmup_steps", self.warmup_steps, 0)
        require_integer("check_rounds", self.check_rounds, 0)
        require_integer("seed", self.seed, 0, 2**63 - 1)
        self._require("learning_rate", 0 < self.learning_rate < 1e30, "a positive number below 1e30")
        self._require("momentum", 0 <= self.momentum < 1, "a number of at least 0 and below 1")
        self._require("weight_decay", self.weight_decay >= 0, "a number of at least 0")
        self._require("decay_factor", 0 < self.decay_factor <= 1, "a number above 0 and at most 1")
        self._require("flush_seconds", self.flush_seconds >= 0, "a number of at least 0")
        self._require("nesterov", not self.nesterov or self.momentum > 0, "false where momentum is 0")
        shape = self.image_shape
        self._require("image_shape", len(shape) == 3 and min(shape) >= 1, "channels x height x width, as 3x32x32")
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
        self._require("task", Path(path).is_file(), "a file that exists, as path/to/file.py:function")
        # Absolute, so that a run's config.toml can be given back from anywhere.
        object.__setattr__(self, "task", f"{Path(path).resolve()}:{function}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InputError(name, getattr(self, name), allowed)

    def rule(self) -> Rule:
        """Return the averaging rule that the options describe."""
        own = algorithms.option_names(self.algorithm)
        given = {name: getattr(self, name) for name in {*_algorithm_options(), *own}}
        return algorithms.build(self.algorithm, {name: value for name, value in given.items() if value is not None})

    def as_toml(self) -> dict[str, Any]:
        """Return the options that are set, as a TOML file holds them."""
        values = dataclasses.asdict(self)
        values["image_shape"] = "x".join(map(str, self.image_shape))
        return {name: value for name, value in values.items() if value is not None}


def _algorithm_options() -> set[str]:
    """Return the options that are arguments of algorithms and nothing else."""
    sections = {field.name: field.metadata["section"] for field in dataclasses.fields(Config)}
    return {name for name in algorithms.all_option_names() if sections[name] == _AVERAGING}


def from_sources(path: str | None, options: Mapping[str, Any]) -> Config:
    """Return the configuration of defaults, then the TOML file at `path`, then `options`.

    Raises `InputError` for a file that cannot be read or holds an unknown option.
    """
    values = {} if path is None else _read_toml(path)
    chosen = str(options.get("algorithm")).replace("-", "_")
    if chosen in algorithms.ALGORITHMS:  # the command line's choice leaves out what it does not take of the file's
        own = set(algorithms.option_names(chosen))
        if str(values.get("algorithm", chosen)).replace("-", "_") != chosen:
            own = set()  # the file's are another algorithm's, also where a name is the same
        foreign = _algorithm_options() - own
        if algorithms.ALGORITHMS[chosen]().server is None:
            foreign.add("num_servers")
        values = {name: value for name, value in values.items() if name not in foreign}
    if "epochs" in options:  # the command line's choice of run length replaces the file's
        values.pop("steps", None)
    if "steps" in options:
        values.pop("epochs", None)
    return Config(**{**values, **options})


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            read = tomllib.load(file)
    except OSError as error:
        raise InputError("config", path, f"a file that can be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("config", path, f"a TOML file ({' '.join(str(error).split())})") from error
    valid = [field.name for field in dataclasses.fields(Config)]
    values = {name.replace("-", "_"): value for name, value in read.items()}
    for name in values:
        if name not in valid:
            raise InputError("config", path, f"a file of known options; {name!r} is none of {', '.join(valid)}")
    return values


def _chosen(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the choice that `value` names; dashes and underscores are the same."""
    for choice in choices:
        if value.replace("_", "-") == choice.replace("_", "-"):
            return choice
    raise InputError(name, value, f"one of {', '.join(choice.replace('_', '-') for choice in choices)}")


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type the field declares, from a string (command line) or a TOML value."""
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            return _read(value, kind)
    words = {bool: "true or false", str: "a text", int: "an integer", float: "a finite number"}
    raise InputError(name, value, words.get(kinds[0], "sizes such as 3x32x32"))


def _read(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`; raises where it is something else."""
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            return tuple(int(part) for part in re.split("[x,]", value))
        return tuple(_read(part, int) for part in value)
    if kind in (bool, str):
        if isinstance(value, kind):
            return value
    elif not isinstance(value, bool) and not (kind is int and isinstance(value, float)) and math.isfinite(kind(value)):
        return kind(value)
    raise TypeError(value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union of types, or the type alone."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)
