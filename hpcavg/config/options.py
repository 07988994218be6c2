"""A run's configuration: all its options, by section. Light to import: no torch, no MPI.

The command line, TOML files and a run's ``config.toml`` name options flatly, without their sections. `OPTIONS` lists
them. To add an option, declare it in its section, in `hpcavg.config.sections`, and use it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hpcavg import algorithms
from hpcavg.algorithms.rule import Rule
from hpcavg.config.section import Option, Section, options_of
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.config.sections.checkpoints import CheckpointOptions
from hpcavg.config.sections.faults import FaultOptions
from hpcavg.config.sections.method import ARGUMENTS, Method, MethodOptions
from hpcavg.config.sections.optimization import OptimizationOptions
from hpcavg.config.sections.problem import ProblemOptions
from hpcavg.config.sections.roles import RoleOptions
from hpcavg.config.sections.run import RunOptions
from hpcavg.errors import InputError, require_integer

CONFIG_FILE, CHECKPOINTS = "config.toml", "checkpoints"

SECTIONS: dict[str, type[Section]] = {
    "method": MethodOptions,
    "roles": RoleOptions,
    "averaging": AveragingOptions,
    "problem": ProblemOptions,
    "optimization": OptimizationOptions,
    "run": RunOptions,
    "checkpoints": CheckpointOptions,
    "faults": FaultOptions,
}
OPTIONS: dict[str, Option] = {
    option.name: option for section, owner in SECTIONS.items() for option in options_of(section, owner)
}
"""Every option by its flat name, in the order of ``--help``."""


@dataclass(frozen=True, init=False)
class Config:
    """All options of a training run, checked and resolved.

    An option is in its section, as ``config.run.seed``. Users' task files may also use the flat name, ``config.seed``.
    None means: decided by the algorithm, the run length or the machine.

    Parameters
    ----------
    options : options by their flat names, as values or as texts of the command line.

    Raises
    ------
    InputError
        If a value cannot be used or options exclude each other. It names the option, its value and what is allowed.

    Examples
    --------
    >>> config = Config(algorithm="k-avg", k=4, steps=100)
    >>> config.run.steps, config.seed, config.rule().options
    (100, 0, {'k': 4})
    """

    method: Method
    roles: RoleOptions
    averaging: AveragingOptions
    problem: ProblemOptions
    optimization: OptimizationOptions
    run: RunOptions
    checkpoints: CheckpointOptions
    faults: FaultOptions

    def __init__(self, **options: Any) -> None:
        unknown = options.keys() - OPTIONS.keys()
        if unknown:
            raise TypeError(f"Config has no option {min(unknown)!r}")
        given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, option in OPTIONS.items():
            if name in options:
                given[option.section][option.field] = option.read(options[name])
        for section, owner in SECTIONS.items():
            object.__setattr__(self, section, owner(**given[section]))
        rule = self.rule()
        self._check(rule)
        # The algorithm's defaults become options, and so does what it sets in the optimizer.
        self._change("method", {name: value for name, value in rule.options.items() if name in ARGUMENTS})
        self._change("optimization", rule.optimizer)

    def __getattr__(self, name: str) -> Any:
        if name not in OPTIONS:
            raise AttributeError(f"Config has neither a section nor an option {name!r}")
        return getattr(getattr(self, OPTIONS[name].section), OPTIONS[name].field)

    def _change(self, section: str, values: dict[str, Any]) -> None:
        object.__setattr__(self, section, dataclasses.replace(getattr(self, section), **values))

    def _check(self, rule: Rule) -> None:
        """Check what concerns options of several sections."""
        label = self.method.label
        self._require("resume", self.checkpoints.resume != "auto" or self.run.output, "a path, or auto with --output")
        self._require("optimizer", not rule.optimizer or self.optimization.optimizer == "sgd", f"sgd for {label}")
        if rule.rate is not None:
            allowed = f"{label} sets the learning rate"
            self._require("schedule", self.optimization.schedule == "constant", f"constant: {allowed}")
            self._require("warmup_steps", self.optimization.warmup_steps == 0, f"0: {allowed}")
        num_servers, may_simulate = self.roles.num_servers, rule.server is not None and self.roles.may_share_ranks
        if num_servers is not None:
            require_integer("num_servers", num_servers, 0 if rule.server is None or may_simulate else 1)
        is_timed = may_simulate and not num_servers
        allowed = "constant, unless one rank holds all learners of an algorithm with servers, and no rank is a server"
        self._require("step_times", is_timed or self.averaging.step_times == "constant", allowed)
        if rule.server is None:
            self._require("num_servers", not num_servers, f"0 for {label}")
            return
        self._require("check_rounds", not self.averaging.check_rounds, f"0 for {label}")
        why = f"{label}, whose servers' state is in no checkpoint"
        self._require("resume", self.checkpoints.resume is None, f"unset for {why}")
        self._require("checkpoint_steps", self.checkpoints.checkpoint_steps is None, f"unset for {why}")
        self._require("on_failure", self.faults.on_failure == "abort", f"abort for {why}")

    def _require(self, name: str, holds: object, allowed: str) -> None:
        if not holds:
            raise InputError(name, getattr(self, name), allowed)

    def rule(self) -> Rule:
        """Return the averaging rule that the options describe."""
        algorithm = self.method.algorithm
        names = dict.fromkeys([*ARGUMENTS, *algorithms.option_names(algorithm)])
        given = {name: getattr(self, name) for name in names}
        return algorithms.build(algorithm, {name: value for name, value in given.items() if value is not None})

    def servers_of(self, num_ranks: int) -> int:
        """Return how many of `num_ranks` ranks serve parameters instead of learning."""
        if self.rule().server is None:
            return 0
        if self.roles.num_servers is not None:
            return self.roles.num_servers
        simulates = (self.roles.learners_per_rank or 1) > 1 or (num_ranks == 1 and self.roles.may_share_ranks)
        return 0 if simulates else 1

    def learners_of_rank(self, num_ranks: int) -> int:
        """Return how many learners each rank that is no server holds, of `num_ranks` ranks.

        Raises
        ------
        InputError
            If the learners cannot be divided among the ranks, or several of them in a rank exclude another option.
        """
        per_rank = self.roles.learners_of_rank(max(1, num_ranks - self.servers_of(num_ranks)))
        if per_rank > 1:
            for name, is_alone in {
                "precision": self.run.precision == "fp16",  # its scaler skips a step of all of them
                "channels_last": self.run.channels_last,
                "compile": self.run.compile,
            }.items():
                if is_alone:
                    value = getattr(self, name)
                    raise InputError("learners_per_rank", per_rank, f"1 with {name}={value}")
            if self.rule().server is not None and num_ranks > 1:
                allowed = f"1 with {self.method.label} on {num_ranks} ranks: servers are simulated on one rank alone"
                raise InputError("learners_per_rank", per_rank, allowed)
        return per_rank

    def as_toml(self) -> dict[str, Any]:
        """Return the options that are set, by their flat names, as a TOML file holds them."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: OPTIONS[name].write(value) for name, value in values.items() if value is not None}


def underscored(name: Any) -> str:
    """Return an option's name as `OPTIONS` spells it; anything but a text has none."""
    return name.replace("-", "_") if isinstance(name, str) else ""
