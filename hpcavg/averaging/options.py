"""What an averager can be asked for, and what goes together."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.averaging.health import POLICIES as HEALTH_POLICIES
from hpcavg.averaging.optimizer_state import POLICIES as STATE_POLICIES
from hpcavg.averaging.replica import STARTS
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.watchdog import timeout_or_default
from hpcavg.engines.base import Engine
from hpcavg.errors import InputError, require_integer, require_number

# What rules that are not made by `hpcavg.algorithms` are told apart by; a schedule cannot be compared.
_PARTS_OF_A_RULE = (
    "how",
    "how_buffers",
    "delay_steps",
    "averages",
    "before_step",
    "agrees_on",
    "own_pace",
    "optimizer",
)
BUFFER_POLICIES = ("average", "keep", "recompute")
_POLICIES = {
    "buffers": BUFFER_POLICIES,
    "optimizer_state": STATE_POLICIES,
    "non_finite": HEALTH_POLICIES,
    "start": STARTS,
}


@dataclass(frozen=True)
class Options:
    """What an averager is asked for beside its rule, the same on all ranks; see `hpcavg.Averager`."""

    engine: str = "auto"
    buffers: str = "average"
    optimizer_state: str = "keep"
    total_steps: int | None = None
    batch_size: int | None = None
    measure_distance: bool = False
    wire_dtype: str | None = None
    error_feedback: bool = False
    non_finite: str = "exclude"
    check_rounds: int = 0
    start: str = "rank0"
    hang_timeout: float | None = None

    @property
    def timeout_s(self) -> float:
        """Seconds that a rank may be waited for; 0 for ever."""
        return timeout_or_default(self.hang_timeout)

    def check(self, rule: Rule, topology: Topology) -> None:
        """Raise `InputError` for what cannot be used or does not go together."""
        if not isinstance(rule, Rule):
            raise InputError("algorithm", rule, "a rule of hpcavg.algorithms, such as algorithms.k_avg(8)")
        for option, policies in _POLICIES.items():
            if getattr(self, option) not in policies:
                raise InputError(option, getattr(self, option), f"one of {', '.join(policies)}")
        require_integer("check_rounds", self.check_rounds, 0)
        for option in ("total_steps", "batch_size"):
            if getattr(self, option) is not None:
                require_integer(option, getattr(self, option), 1)
        require_number("hang_timeout", self.timeout_s, lambda value: value >= 0, "a number of seconds, 0 for no limit")
        if self.optimizer_state == "average" and rule.delay_steps:
            allowed = f"keep or reset: delay = {rule.delay_steps} hides a mean"
            raise InputError("optimizer_state", self.optimizer_state, allowed)
        if rule.server is None and topology.num_servers:
            raise InputError("num_servers", topology.num_servers, f"0: {rule.name} has no use for servers")
        if rule.server is not None:
            self._check_served(rule, topology)

    def _check_served(self, rule: Rule, topology: Topology) -> None:
        if not topology.num_servers:
            raise InputError("num_servers", 0, f"at least 1: {rule.name} exchanges with servers")
        if topology.has_busy_servers:
            allowed = "another one: its servers serve another Averager, which has not finished"
            raise InputError("topology", f"with {topology.num_servers} servers", allowed)
        if self.optimizer_state != "keep":
            raise InputError("optimizer_state", self.optimizer_state, f"keep: {rule.name} takes no global means")
        if self.check_rounds:
            raise InputError("check_rounds", self.check_rounds, f"0: {rule.name} takes no global means")


def check_alike(topology: Topology, rule: Rule, options: Options, optimizer: str, number: int) -> None:
    """Raise `InputError` on every rank where ranks were given different rules or options. Collective over all ranks.

    Learners with different rules would wait for means that the others never take. optimizer : its type's name. number :
    of the averager on its topology.
    """
    told = {"algorithm": rule.name or type(rule).__name__}
    told |= {f"algorithm.{option}": repr(value) for option, value in rule.options.items()}
    told |= {f"algorithm.{name}": _text(getattr(rule, name)) for name in _PARTS_OF_A_RULE}
    told |= {option: repr(value) for option, value in asdict(options).items()}
    told |= {"hang_timeout": repr(options.timeout_s), "optimizer": optimizer, "topology": f"with {number} averagers"}
    first = topology.all_ranks.bcast(told)
    error = None
    for option in [*first, *told]:
        if told.get(option) != first.get(option):
            given = f"{told.get(option, 'left out')} on rank {topology.rank}"
            error = InputError(option, given, f"{first.get(option, 'left out')}, as on rank 0")
            break
    topology.raise_everywhere(error)


def _text(part: object) -> str:
    """Return what tells a part of a rule from others: its value, or the type of an object and what that holds."""
    return repr(part) if type(part).__repr__ is not object.__repr__ else f"{type(part).__name__}{vars(part)}"


def check_wire(rule: Rule, engine: Engine, topology: Topology, wire_dtype: str | None) -> None:
    """Raise `InputError` where what crosses nodes cannot be compressed."""
    if wire_dtype is None:
        return
    if not engine.compresses and topology.num_learner_ranks > 1:
        raise InputError("wire_dtype", wire_dtype, f"left out with engine {engine.name}; twolevel compresses")
    if rule.server is not None:
        raise InputError("wire_dtype", wire_dtype, f"left out with {rule.name}, which takes no means")


def check_step(rule: Rule, topology: Topology, loss: float | Tensor | None, has_closure: bool) -> None:
    """Raise `InputError` where a step cannot be taken so."""
    if has_closure and rule.before_step:
        raise InputError("closure", "given", f"left out: {rule.name} averages before the step")
    if topology.is_server:
        raise InputError("rank", topology.rank, "a learner: servers take no steps; loop while not averager.done")
    if rule.agrees_on == "loss":
        if loss is None:
            raise InputError("loss", None, f"the step's training loss, which the periods of {rule.name} follow")
        if isinstance(loss, Tensor) and loss.numel() != 1:
            given = f"a tensor of shape {tuple(loss.shape)}"
            raise InputError("loss", given, "one number, the mean over the mini-batch")
