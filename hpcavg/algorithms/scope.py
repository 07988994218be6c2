"""WHO: the learners over which a mean is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpcavg.errors import InputError


@dataclass(frozen=True)
class Scope:
    """The learners over which a mean is taken, or the parameter servers.

    Parameters
    ----------
    name : its name in events, metrics and messages; at most 16 characters.

    Examples
    --------
    >>> from hpcavg.algorithms.scope import GLOBAL
    >>> GLOBAL.name
    'global'
    """

    name: str

    def __str__(self) -> str:
        return self.name


LOCAL = Scope("local")
"""The learners of a local group. All of them get the same mean."""
GLOBAL = Scope("global")
"""All learners. All of them get the same mean."""
SERVER = Scope("server")
"""The servers, and the learners that exchange parameters with them."""


@dataclass(frozen=True)
class Neighbours(Scope):
    """The neighbours of each learner on a graph: every learner gets a weighted mean of its own.

    The mixing matrix W must be doubly stochastic: its entries are at least 0, and its rows and columns sum to 1. Such a
    matrix does not change the mean over all learners (Lian et al. 2017, Assumption 1).

    Parameters
    ----------
    weights : maps a learner and the number of learners to row W[learner, :], as a mapping from learner to weight that
        leaves out zeros.

    Examples
    --------
    >>> from hpcavg.algorithms.scope import Neighbours
    >>> pair = Neighbours("pair", lambda learner, num_learners: {learner: 0.5, num_learners - 1 - learner: 0.5})
    >>> pair.weights(0, 4)
    {0: 0.5, 3: 0.5}
    """

    weights: Callable[[int, int], Mapping[int, float]]

    def matrix(self, num_learners: int) -> list[Mapping[int, float]]:
        """Return all rows of W for `num_learners` learners.

        Raises
        ------
        InputError
            If W is not doubly stochastic.
        """
        rows = [self.weights(learner, num_learners) for learner in range(num_learners)]
        columns = dict.fromkeys(range(num_learners), 0.0)
        for learner, row in enumerate(rows):
            for source, weight in row.items():
                if source not in columns or not weight >= 0:
                    allowed = f"weights of at least 0 for learners 0 to {num_learners - 1}"
                    raise InputError("scope", f"{self.name}: W[{learner}, {source}] = {weight}", allowed)
                columns[source] += weight
        for what, sums in (("row", [sum(row.values()) for row in rows]), ("column", list(columns.values()))):
            for index, total in enumerate(sums):
                if not math.isclose(total, 1.0, abs_tol=1e-9):
                    allowed = f"doubly stochastic: the weights of {what} {index} sum to 1, not {total:.6g}"
                    raise InputError("scope", self.name, allowed)
        return rows
