"""Decentralized SGD: every learner averages with its neighbours on a graph, and no mean is over all learners."""

from __future__ import annotations

from functools import partial

from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run, Schedule
from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.errors import InputError, require_integer


def ring_weights(learner: int, num_learners: int) -> dict[int, float]:
    """Return a learner's weights on a ring: a third each for itself and two neighbours. Two learners take their mean.

    Examples
    --------
    >>> ring_weights(0, 5)
    {0: 0.3333333333333333, 1: 0.3333333333333333, 4: 0.3333333333333333}
    """
    neighbours = {(learner + offset) % num_learners for offset in (-1, 0, 1)}
    return {neighbour: 1 / len(neighbours) for neighbour in sorted(neighbours)}


def hop_weights(learner: int, num_learners: int, hop: int) -> dict[int, float]:
    """Return a learner's weights if it averages with the learner `hop` places before it: a half each."""
    neighbours = {learner, (learner - hop) % num_learners}
    return {neighbour: 1 / len(neighbours) for neighbour in neighbours}


def exponential_graphs(num_learners: int) -> list[Neighbours]:
    """Return the one-peer exponential graphs, used in turn: hops of 1, 2, 4, ... below P, as in SGP."""
    hops = [2**exponent for exponent in range(max(1, (num_learners - 1).bit_length()))]
    return [Neighbours(f"hop {hop}", partial(hop_weights, hop=hop)) for hop in hops]


_RING = Neighbours("ring", ring_weights)
_GRAPHS = {"ring": lambda num_learners: [_RING], "exponential": exponential_graphs}


@algorithm(
    options={
        "topology": "neighbours of each learner: ring, or exponential (one peer, 1, 2, 4, ... places away in turn)"
    },
    source="D-PSGD, Lian et al. 2017; exponential graph: SGP, Assran et al. 2019",
    when="t mod k = 0",
    who="neighbours on the graph",
    how="x_i = sum_j W_ij u_j, W doubly stochastic",
    sends="2M/k on the ring, M/k on the exponential graph",
    choose="if a mean over all waits too long: each learner waits for its neighbours only",
)
def gossip(topology: str = "ring", k: int = 1) -> Rule:
    """Average with the neighbours on a graph every `k` steps: x_i = Σ_j W_ij u_j, u_j being what learner j's step gave.

    D-PSGD (Algorithm 1) takes the mean before it adds the gradient's step; the exponential graph is SGP's. The final
    model is the mean over all learners.

    Parameters
    ----------
    topology : ``"ring"``, two neighbours with weights of 1/3 each, or ``"exponential"``, one neighbour with weight 1/2:
        the learner 1 place before, at the next mean 2 places before, then 4, and so on below P.
    k : steps between two means, at least 1.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.gossip("exponential").options
    {'topology': 'exponential', 'k': 1}
    """
    if topology not in _GRAPHS:
        raise InputError("topology", topology, f"one of {', '.join(_GRAPHS)}")
    require_integer("k", k, 1)

    def when(run: Run) -> Schedule:
        graphs = _GRAPHS[topology](run.num_learners)

        def due(progress: Progress) -> Scope | None:
            number, rest = divmod(progress.step, k)
            return None if rest else graphs[(number - 1) % len(graphs)]

        return due

    return Rule(when)
