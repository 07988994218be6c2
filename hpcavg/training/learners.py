"""The models and random generators of a rank's learners, whether it has one or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hpcavg.averaging.stacked import Stacked
from hpcavg.checkpoints import random_state
from hpcavg.checkpoints.form import load_fitting

# In torch's words, why vmap refuses layers such as dropout.
_RANDOM = "randomness error mode"


class Learners:
    """The learners of a rank.

    Several learners share Python's and NumPy's generators. Torch's is each learner's own, unless the model draws for
    all of them at once.

    Parameters
    ----------
    model : Module
        A model, or a stacked one.
    own_streams : bool
        Whether each of several learners draws from a stream of its own (``--stacked-randomness exact``).
    """

    def __init__(self, model: nn.Module, own_streams: bool = True) -> None:
        self._model = model
        self._stacked = model if isinstance(model, Stacked) else None
        self._own_streams = own_streams
        self._random: list[Mapping[str, Any]] = []  # of several learners, when they began

    def __len__(self) -> int:
        return 1 if self._stacked is None else self._stacked.learners

    @property
    def way(self) -> str | None:
        """How several learners compute: ``vmap``, or ``loop`` and why; None for one learner."""
        if self._stacked is None:
            return None
        why = self._stacked.why_loop
        if why is not None and _RANDOM in why:
            why = "random layers draw for each learner alone, with --stacked-randomness exact"
        return "vmap" if why is None else f"loop: {why}"

    def state_of(self, row: int) -> dict[str, Any]:
        """Return the ``state_dict`` of one learner's model."""
        return self._model.state_dict() if self._stacked is None else self._stacked.state_dict_of(row)

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give every learner's model its state. Raises `InputError` if it is of another model."""
        for row, state in enumerate(states):
            if self._stacked is None:
                load_fitting(self._model.load_state_dict, state, "model")
            else:
                load_fitting(partial(self._stacked.load_state_dict_of, row), state, "model")

    # -- random numbers -------------------------------------------------------------------------------------------

    def seed(self, seeds: Sequence[int]) -> None:
        """Let the generators of every learner begin anew from its seed."""
        states = []
        for seed in seeds:
            random_state.seed_generators(seed)
            states.append(random_state.save())
        self.load_random(states)

    def random_of(self, row: int) -> dict[str, Any]:
        """Return the states of one learner's generators."""
        state = random_state.save() if row == 0 else dict(self._random[row])
        if self._stacked is not None and self._stacked.random_states is not None:
            state["torch"] = self._stacked.random_states[row]
        return state

    def load_random(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give the generators of every learner the states that `random_of` returned."""
        random_state.load(states[0])
        self._random = list(states)
        if self._stacked is not None and self._own_streams:
            self._stacked.random_states = [torch.as_tensor(state["torch"]) for state in states]
