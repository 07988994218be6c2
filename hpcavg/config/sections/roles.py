"""The roles of the ranks: learners in local groups, and servers."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, integer, option


@dataclass(frozen=True)
class RoleOptions(Section):
    """The arguments of `hpcavg.Topology`."""

    title = "averaging"

    num_servers: int | None = option(
        None, "ranks that serve parameters, of the last; unset: 1 where the algorithm has a server"
    )
    group_size: int | None = option(None, "ranks in a local group; unset: the ranks of a node", integer(1))
