"""Checks of an averager's rule, options and calls."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.watchdog import timeout_or_default
from hpcavg.engines.base import Engine
from hpcavg.engines.crossing import CHUNKS
from hpcavg.errors import InputError, require_number
from hpcavg.utils.text import counted

# The parts of a rule that ranks compare. A schedule is a function and cannot be compared.
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


def timeout_s(options: AveragingOptions) -> float:
    """Return how many seconds others wait for a rank before it is reported; 0: no limit."""
    return timeout_or_default(options.hang_timeout)


def check_rule(rule: Rule, options: AveragingOptions, topology: Topology, learners: int) -> None:
    """Raise `InputError` if rule, options, topology and a model of so many learners exclude each other."""
    if learners != topology.learners_per_rank:
        allowed = f"of {topology.learners_per_rank}, as the topology has in a rank: hpcavg.stack makes it"
        raise InputError("model", f"of {counted(learners, 'learner')}", allowed)
    if not isinstance(rule, Rule):
        raise InputError("algorithm", rule, "a rule of hpcavg.algorithms, such as algorithms.k_avg(8)")
    require_number("hang_timeout", timeout_s(options), lambda value: value >= 0, "a number of seconds, 0 for no limit")
    if options.optimizer_state == "average" and rule.delay_steps:
        allowed = f"keep or reset: delay = {rule.delay_steps} hides a mean"
        raise InputError("optimizer_state", options.optimizer_state, allowed)
    if options.step_times != "constant" and (rule.server is None or topology.num_servers):
        allowed = "constant, unless an asynchronous rule runs without server ranks, in simulated time"
        raise InputError("step_times", options.step_times, allowed)
    if rule.server is None:
        if topology.num_servers:
            raise InputError("num_servers", topology.num_servers, f"0: {rule.name} has no use for servers")
        return
    if learners == 1 and not topology.num_servers:
        raise InputError("num_servers", 0, f"at least 1: {rule.name} exchanges with servers")
    if learners > 1 and (topology.num_servers or topology.num_learner_ranks > 1):
        allowed = f"1 with {rule.name} on {topology.num_ranks} ranks: only one rank alone simulates servers"
        raise InputError("learners_per_rank", learners, allowed)
    if topology.has_busy_servers:
        allowed = "another one: its servers serve another Averager, which has not finished"
        raise InputError("topology", f"with {topology.num_servers} servers", allowed)
    if options.optimizer_state != "keep":
        raise InputError("optimizer_state", options.optimizer_state, f"keep: {rule.name} takes no global means")
    if options.check_rounds:
        raise InputError("check_rounds", options.check_rounds, f"0: {rule.name} takes no global means")


def check_alike(topology: Topology, rule: Rule, options: AveragingOptions, optimizer: str, number: int) -> None:
    """Raise `InputError` on every rank if ranks have different rules or options. Collective over all ranks.

    Learners with different rules would wait for means that the others never take.

    Parameters
    ----------
    topology : all ranks.
    rule : this rank's rule.
    options : this rank's options.
    optimizer : the name of the optimizer's type.
    number : number of averagers that the topology had before.
    """
    own = {"algorithm": rule.name or type(rule).__name__}
    own |= {f"algorithm.{option}": repr(value) for option, value in rule.options.items()}
    own |= {f"algorithm.{name}": _text(getattr(rule, name)) for name in _PARTS_OF_A_RULE}
    own |= {field.name: repr(getattr(options, field.name)) for field in fields(options) if field.compare}
    own |= {"hang_timeout": repr(timeout_s(options)), "optimizer": optimizer, "topology": f"with {number} averagers"}
    first = topology.all_ranks.bcast(own)
    error = None
    for option in [*first, *own]:
        if own.get(option) != first.get(option):
            given = f"{own.get(option, 'left out')} on rank {topology.rank}"
            error = InputError(option, given, f"{first.get(option, 'left out')}, as on rank 0")
            break
    topology.raise_everywhere(error)


def _text(part: object) -> str:
    """Return a part of a rule as text for the comparison: its value, or its type and attributes."""
    return repr(part) if type(part).__repr__ is not object.__repr__ else f"{type(part).__name__}{vars(part)}"


def check_wire(rule: Rule, engine: Engine, topology: Topology, options: AveragingOptions) -> None:
    """Raise `InputError` for options on messages between nodes that the engine or the rule cannot follow."""
    for name in ("wire_dtype", "crossing"):
        given = getattr(options, name)
        if given is None:
            continue
        if not engine.compresses and topology.num_learner_ranks > 1:
            raise InputError(name, given, f"left out with engine {engine.name}; it is for twolevel")
        if rule.server is not None:
            raise InputError(name, given, f"left out with {rule.name}, which takes no means")
    if options.wire_dtype is not None and options.crossing is not None and not options.crossing.startswith(CHUNKS):
        raise InputError(
            "crossing", options.crossing, f"{CHUNKS}:LANES:KIB with wire_dtype: MPI cannot sum its messages"
        )


def check_step(
    rule: Rule, topology: Topology, loss: float | Tensor | None, has_closure: bool, has_scaler: bool
) -> None:
    """Raise `InputError` if the rule cannot take a step with these arguments on this rank."""
    if has_closure and rule.before_step:
        raise InputError("closure", "given", f"left out: {rule.name} averages before the step")
    learners = topology.learners_per_rank
    for name, is_given in (("closure", has_closure), ("scaler", has_scaler)):
        if is_given and learners > 1:
            raise InputError(name, "given", f"left out: it would be one for the {learners} learners of a rank")
    if topology.is_server:
        raise InputError("rank", topology.rank, "a learner: servers take no steps; loop while not averager.done")
    if rule.agrees_on == "loss":
        if loss is None:
            raise InputError("loss", None, f"the step's training loss, which the periods of {rule.name} follow")
        size = loss.numel() if isinstance(loss, Tensor) else 1
        if size != learners:
            given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else loss
            what = "one number" if learners == 1 else f"a tensor of shape ({learners},)"
            raise InputError("loss", given, f"{what}, the mean over the mini-batch of each learner")
