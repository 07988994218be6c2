"""What an averager can be asked for, and what goes together."""

from __future__ import annotations

from hpcavg.errors import InputError, require_integer
from hpcavg.mean import Engine
from hpcavg.optimizer_state import POLICIES as STATE_POLICIES
from hpcavg.rule import Rule
from hpcavg.topology import Topology

BUFFER_POLICIES = ("average", "keep", "recompute")


def check(
    rule: Rule, topology: Topology, buffers: str, optimizer_state: str, total_steps: int | None, batch_size: int | None
) -> None:
    """Raise `InputError` for what cannot be used or does not go together."""
    if not isinstance(rule, Rule):
        raise InputError("algorithm", rule, "a rule of hpcavg.algorithms, such as algorithms.k_avg(8)")
    for option, value, policies in (
        ("buffers", buffers, BUFFER_POLICIES),
        ("optimizer_state", optimizer_state, STATE_POLICIES),
    ):
        if value not in policies:
            raise InputError(option, value, f"one of {', '.join(policies)}")
    for option, number in (("total_steps", total_steps), ("batch_size", batch_size)):
        if number is not None:
            require_integer(option, number, 1)
    if rule.server is None and topology.num_servers:
        raise InputError("num_servers", topology.num_servers, f"0: {rule.name} has no use for servers")
    if rule.server is not None:
        if not topology.num_servers:
            raise InputError("num_servers", 0, f"at least 1: {rule.name} exchanges with servers")
        if optimizer_state != "keep":
            raise InputError("optimizer_state", optimizer_state, f"keep: {rule.name} takes no global means")


def check_wire(rule: Rule, engine: Engine, topology: Topology, wire_dtype: str | None) -> None:
    """Raise `InputError` where what crosses nodes cannot be compressed."""
    if wire_dtype is None:
        return
    if not engine.compresses and topology.num_learners > 1:
        raise InputError("wire_dtype", wire_dtype, f"left out with engine {engine.name}; twolevel compresses")
    if rule.server is not None:
        raise InputError("wire_dtype", wire_dtype, f"left out with {rule.name}, which takes no means")
