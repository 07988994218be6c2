"""Tensors that the user exchanges in the middle of a run: buffers are adopted, all else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from hpcavg.averaging import model_parts
from hpcavg.averaging.flat_buffer import form
from hpcavg.errors import InputError

_UNCHANGED = "as when it was handed over; make a new Averager"
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class KnownTensors:
    """The tensors of a model and an optimizer, by name, as they were at the last look.

    Parameters
    ----------
    model : the model.
    optimizer : the optimizer.
    parts : what both consist of.
    averaged : the buffers that are averaged, by name.

    Attributes
    ----------
    averaged_names : the names of the buffers that are averaged.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: model_parts.Parts,
        averaged: Mapping[str, Tensor],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._frozen = parts.frozen
        self._non_persistent = parts.non_persistent
        self._known = {**parts.parameters, **averaged}
        self.averaged_names = set(averaged)
        self._ignored = {name for name in parts.buffers if name not in averaged}
        self._remember()

    def may_differ(self) -> bool:
        """Return whether a tensor may have been exchanged, added, removed or unfrozen since the last look. Fast."""
        now, seen = self._objects(), self._seen
        is_other = len(now) != len(seen) or any(map(is_not, now, seen)) or any(self._empty)
        return is_other or any(map(_REQUIRES_GRAD, self._frozen.values()))

    def look_again(self) -> dict[int, Tensor]:
        """Return the buffers that were reassigned (``module.b = new``), by the `id` of the buffers before.

        Raises
        ------
        InputError
            Names a tensor that is new, gone, unfrozen, or exchanged for another that cannot take its place.
        """
        parts = model_parts.look_up(self._model, self._optimizer)
        found = {**parts.parameters, **parts.buffers}
        adopted: dict[int, Tensor] = {}
        for name, then in list(self._known.items()):
            now = found.get(name)
            if now is then:
                continue
            is_buffer = name in self.averaged_names
            if is_buffer and now is not None and form_of(now) == form_of(then):
                adopted[id(then)] = now
            elif is_buffer and (name in parts.non_persistent or (now is None and name in self._non_persistent)):
                self._ignore(name)
            else:
                is_other = now is not None and form_of(now) == form_of(then)
                wanted = "there" if now is None else "the same tensor (assign=False)" if is_other else form_of(then)
                raise InputError("model", name, f"{wanted}, {_UNCHANGED}")
        for name, then in self._known.items():
            if found[name] is not adopted.get(id(then), then):
                raise InputError("model", name, f"one tensor under all its names, {_UNCHANGED}")
        self._refuse_new(parts)
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                allowed = "frozen as when it was handed over; unfreeze before making the Averager"
                raise InputError("model", name, allowed)
        self._known = {name: adopted.get(id(then), then) for name, then in self._known.items()}
        self._remember()
        return adopted

    def _ignore(self, name: str) -> None:
        """Leave a buffer alone from now on. Its slot in the flat buffer stays, unused."""
        del self._known[name]
        self.averaged_names.remove(name)
        self._ignored.add(name)

    def _refuse_new(self, parts: model_parts.Parts) -> None:
        known = set(map(id, self._known.values()))
        for name, tensor in parts.parameters.items():
            if id(tensor) not in known:
                option = "optimizer" if name.startswith("optimizer.") and name not in self._known else "model"
                raise InputError(option, name, f"a parameter {_UNCHANGED}")
        for name, tensor in parts.buffers.items():
            is_new = name not in self._known and name not in self._ignored and name not in parts.non_persistent
            if is_new and model_parts.is_averaged_buffer(tensor):
                raise InputError("model", name, f"a buffer {_UNCHANGED}")

    # -- the fast look --------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Note the dictionaries in which the model keeps its tensors, and the tensors in them."""
        modules = list(self._model.modules())
        parts: list[dict[str, Any]] = [
            part for module in modules for part in (module._modules, module._parameters, module._buffers)
        ]
        self._full, self._empty = [part.values() for part in parts if part], [part for part in parts if not part]
        self._seen = self._objects()

    def _objects(self) -> list[Any]:
        """Return all objects in the dictionaries and the optimizer."""
        return list(chain(*self._full, *(group["params"] for group in self._optimizer.param_groups)))


def form_of(tensor: Tensor) -> str:
    """Return shape, dtype and device of `tensor` in words."""
    return form(tensor.shape, tensor.dtype, tensor.device)
