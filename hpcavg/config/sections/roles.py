"""The roles of the ranks: learners in local groups, and servers."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, integer, option
from hpcavg.errors import InputError


@dataclass(frozen=True)
class RoleOptions(Section):
    """The arguments of `hpcavg.Topology`."""

    title = "averaging"

    num_servers: int | None = option(
        None,
        "ranks that serve parameters, of the last; unset: 1 where the algorithm has a server, 0 where one rank holds"
        " several learners and simulates it",
    )
    group_size: int | None = option(None, "learners in a local group; unset: the learners of a node", integer(1))
    learners_per_rank: int | None = option(
        None, "learners that each rank holds and computes together; unset: 1, or as --learners asks", integer(1)
    )
    learners: int | None = option(
        None, "learners of all ranks together; unset: the ranks times --learners-per-rank", integer(1)
    )

    @property
    def may_share_ranks(self) -> bool:
        """Whether the options ask for more than one learner in a rank, if there are few enough ranks."""
        return max(self.learners_per_rank or 1, self.learners or 1) > 1

    def learners_of_rank(self, num_learner_ranks: int) -> int:
        """Return the learners of each of `num_learner_ranks` ranks.

        Raises
        ------
        InputError
            If `learners` cannot be divided among them, or `learners_per_rank` says otherwise.
        """
        per_rank = self.learners_per_rank or 1
        if self.learners is None:
            return per_rank
        wanted, rest = divmod(self.learners, num_learner_ranks)
        if rest or not wanted:
            allowed = f"a multiple of {num_learner_ranks}, the number of ranks with learners"
            raise InputError("learners", self.learners, allowed)
        if self.learners_per_rank not in (None, wanted):
            allowed = f"{wanted} or unset: --learners {self.learners} on {num_learner_ranks} ranks"
            raise InputError("learners_per_rank", self.learners_per_rank, allowed)
        return wanted
