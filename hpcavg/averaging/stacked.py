"""Many learners in one rank: a model whose parameters and buffers have a leading axis of learners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from hpcavg.averaging.flat_buffer import dense_strides, tied
from hpcavg.averaging.model_parts import is_plain
from hpcavg.errors import InputError, reason, require_integer

_EXACT, _FAST = "exact", "fast"
_SEVERAL = "where a rank has several learners"
# What the backward passes of the learners that run at once may keep: it should stay in the cache.
_KEPT_BYTES = 8 * 2**20
_LEAST_AT_ONCE = 32
_Way: TypeAlias = Callable[..., Any]


def stack(model: torch.nn.Module, learners: int, randomness: str = _EXACT) -> Stacked:
    """Return `model` for several learners, all with its values. It takes over the model, whose tensors get the axis.

    Parameters
    ----------
    model : a model whose parameters and buffers are dense.
    learners : number of learners, R.
    randomness : what random operations of the model, such as dropout, do. ``"exact"``: every learner draws from a
        generator of its own, as on a rank of its own; such a model runs learner by learner. ``"fast"``: all learners
        draw at once, from one generator.

    Returns
    -------
    Stacked
        Maps inputs of shape (R, B, ...) to outputs of shape (R, B, ...).

    Raises
    ------
    InputError
        If an argument cannot be used, or the model has sparse or quantized tensors, sparse gradients, or hooks of
        parameters, which would get the gradients of all learners.

    Examples
    --------
    >>> import torch
    >>> import hpcavg
    >>> stacked = hpcavg.stack(torch.nn.Linear(4, 2), learners=3)
    >>> stacked(torch.ones(3, 8, 4)).shape
    torch.Size([3, 8, 2])
    >>> {name: tuple(parameter.shape) for name, parameter in stacked.named_parameters()}
    {'module.weight': (3, 2, 4), 'module.bias': (3, 2)}
    """
    require_integer("learners", learners, 1)
    if randomness not in (_EXACT, _FAST):
        raise InputError("randomness", randomness, f"{_EXACT} or {_FAST}")
    return Stacked(model, learners, randomness)


class Stacked(torch.nn.Module):
    """A model with a leading axis of learners; `stack` makes it.

    ``torch.vmap`` runs all learners at once. If it refuses the model, they run one after the other.

    Attributes
    ----------
    module : the model. Its tensors have the axis of learners, so it cannot be called itself.
    learners : number of learners, R.
    why_loop : why the learners run one after the other; None if they run at once.
    random_states : the state of every learner's generator, as of ``torch.get_rng_state``, for models whose learners run
        one after the other. None: all draw from torch's own generator.
    active : the rows of the learners that take the next step. The buffers and generators of the others stay as they
        are. None: all learners do.
    """

    def __init__(self, model: torch.nn.Module, learners: int, randomness: str = _EXACT) -> None:
        super().__init__()
        self.learners = learners
        self.why_loop: str | None = None
        self.random_states: list[Tensor] | None = None
        self.active: Sequence[int] | None = None
        self._randomness = "different" if randomness == _FAST else "error"
        self._refused: set[object] = set()
        self._at_once_by_shape: dict[object, int] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            if not is_plain(tensor):
                raise InputError("model", f"{name} of layout {tensor.layout}", f"dense, {_SEVERAL}")
            if _has_hooks(tensor):
                raise InputError("model", f"{name} with a hook", f"of parameters without hooks, {_SEVERAL}")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
                raise InputError("model", f"{name} with sparse=True", f"of dense gradients, {_SEVERAL}")
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                self._refused = {False, True}
                self.why_loop = "torch.vmap leaves out the padding of Embedding(padding_idx) for one learner only"
        for _, tensors in tied(named):
            repeated = _repeat(tensors[0].detach(), learners)
            for tensor in tensors:
                tensor.grad = None
                tensor.data = repeated
        self.module = model

    # -- running --------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> Any:
        """Return the outputs of all learners.

        Parameters
        ----------
        *inputs : the model's arguments, each with the axis of learners.
        """
        self._check_axis("inputs", *inputs)
        return self._map(self.training, self._call_at_once, self._call, self._tensors(), *inputs)

    def each(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Return the results of `function` for all learners, stacked; such as their losses, shape (R,).

        Parameters
        ----------
        function : maps tensors of one learner to a tensor.
        *tensors : each with the axis of learners.

        Examples
        --------
        >>> import torch
        >>> import hpcavg
        >>> stacked = hpcavg.stack(torch.nn.Linear(4, 2), learners=3)
        >>> stacked.each(torch.nn.functional.mse_loss, torch.ones(3, 8), torch.zeros(3, 8))
        tensor([1., 1., 1.])
        """
        self._check_axis("tensors", *tensors)
        at_once = partial(self._at_once, function)
        return self._map(getattr(function, "__code__", function), at_once, function, *tensors)

    def gradients(self, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of the losses to those of the parameters; return the losses, shape (R,).

        It does the same as a backward pass from the sum of the losses, but for some learners at a time: what the
        backward pass needs stays in the cache, and takes less memory. The loss of a learner that waits is NaN.

        Parameters
        ----------
        loss : maps a learner's output and targets to a scalar.
        inputs : with the axis of learners.
        targets : with the axis of learners.

        Examples
        --------
        >>> import torch
        >>> import hpcavg
        >>> stacked = hpcavg.stack(torch.nn.Linear(4, 1, bias=False), learners=3)
        >>> losses = stacked.gradients(lambda output, target: output.sum(), torch.ones(3, 8, 4), torch.zeros(3, 8))
        >>> losses.shape, next(stacked.parameters()).grad[2]
        (torch.Size([3]), tensor([[8., 8., 8., 8.]]))
        """
        self._check_axis("inputs", inputs)
        self._check_axis("targets", targets)
        if any(map(_has_hooks, self.parameters())):  # which a backward pass calls
            found: Tensor = self.each(loss, self(inputs), targets)
            found.sum().backward()
            return found.detach()
        rows = list(range(self.learners) if self.active is None else self.active)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        is_first = [parameter.grad is None for parameter in trained]
        losses = torch.full((self.learners,), torch.nan, device=inputs.device)
        size = self._learners_at_once(loss, inputs, targets)
        is_missing: list[set[bool]] = [set() for _ in trained]
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            found, gradients = self._gradients_of(chunk, loss, inputs, targets)
            losses = losses.to(found.dtype)
            losses[chunk] = found
            for parameter, gradient, is_new, missing in zip(trained, gradients, is_first, is_missing, strict=True):
                missing.add(gradient is None)
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient if len(chunk) == self.learners else torch.zeros_like(parameter)
                if parameter.grad is not gradient:
                    part = parameter.grad[_index(chunk)]
                    parameter.grad[_index(chunk)] = gradient if is_new else part + gradient
        if any(len(missing) > 1 for missing in is_missing):
            raise InputError(
                "model", type(self.module).__name__, f"one that uses the same parameters each time, {_SEVERAL}"
            )
        return losses

    def _learners_at_once(self, loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> int:
        """Return how many learners take their gradients at once; 1 if ``torch.vmap`` refuses the model.

        A trial counts the bytes that the backward pass keeps for inputs of this shape. It changes nothing.
        """
        if self.training in self._refused:
            return 1
        key = self.training, inputs.shape[1:]
        if key not in self._at_once_by_shape:
            rows = range(min(_LEAST_AT_ONCE, self.learners))
            kept: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                kept[tensor.data_ptr()] = tensor.nbytes
                return tensor

            try:
                with (
                    torch.random.fork_rng(devices=[]),
                    torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
                ):
                    _losses, _, parts = self._losses_of(rows, loss, inputs, targets)
            except Exception as error:  # vmap's own errors have no class; those of the model come up again
                self._refused.add(self.training)
                self.why_loop = reason(error)
                return 1
            for part in parts.values():
                kept.pop(part.data_ptr(), None)
            of_one = sum(kept.values()) / len(rows)
            self._at_once_by_shape[key] = max(_LEAST_AT_ONCE, int(_KEPT_BYTES / max(of_one, 1.0)))
        return self._at_once_by_shape[key]

    def _gradients_of(
        self, rows: Sequence[int], loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return the losses of the learners in these rows, and the gradients of their trained parameters."""
        losses, trained, parts = self._losses_of(rows, loss, inputs, targets)
        gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        for name, buffer in self.module.named_buffers():
            buffer[_index(rows)] = parts[name]
        return losses.detach(), gradients

    def _losses_of(
        self, rows: Sequence[int], loss: Callable[..., Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Return the losses of the learners in these rows, their trained parameters, and all of their tensors.

        Buffers are copies. One learner runs on its own, with its generator; several run at once.
        """
        index = _index(rows)
        buffers = dict(self.module.named_buffers())
        parts = {name: tensor.detach()[index] for name, tensor in self._tensors().items()}
        # Under vmap, batch_norm changes a copy of statistics that have gaps between the learners.
        parts |= {name: parts[name].clone(memory_format=torch.contiguous_format) for name in buffers}
        trained = [
            parts[name].requires_grad_() for name, tensor in self.module.named_parameters() if tensor.requires_grad
        ]

        def loss_of(tensors: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return loss(self._call(tensors, inputs), targets)

        if len(rows) == 1:
            with self._generator_of(rows[0]):
                only = {name: part[0] for name, part in parts.items()}
                losses = loss_of(only, inputs[rows[0]], targets[rows[0]]).unsqueeze(0)
        else:
            losses = self._at_once(loss_of, parts, inputs[index], targets[index])
        return losses, trained, parts

    def outputs_of(self, rows: slice, *inputs: Tensor) -> Any:
        """Return the outputs of the learners in these rows.

        Parameters
        ----------
        rows : the rows.
        *inputs : the model's arguments, with an axis for these learners.
        """
        tensors = {name: tensor[rows] for name, tensor in self._tensors().items()}
        if self.training not in self._refused:
            try:
                return self._at_once(self._call, tensors, *inputs)
            except Exception:  # raised again below if it is not of vmap
                pass
        learners = zip(_parts(tensors, len(inputs[0])), *(part.unbind() for part in inputs), strict=True)
        return tree_map(lambda *each: torch.stack(each), *(self._call(*learner) for learner in learners))

    def learner(self, row: int) -> Callable[..., Any]:
        """Return one learner's model as a function, whose inputs have no axis of learners."""
        return lambda *inputs: self._call({name: tensor[row] for name, tensor in self._tensors().items()}, *inputs)

    def _check_axis(self, what: str, *tensors: Any) -> None:
        """Raise `InputError` unless the first axis of all tensors is that of the learners."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape[:1] != (self.learners,):
                raise InputError(what, tuple(tensor.shape), f"of shape ({self.learners}, ...), for as many learners")

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def _call(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """Return the model's output with these tensors. Buffers that it exchanges (``module.b = new``) are kept."""
        held = dict(tensors)
        output = functional_call(self.module, held, inputs)
        for name, tensor in tensors.items():
            if held[name] is not tensor:
                tensor.copy_(held[name])
        return output

    def _map(self, key: object, at_once: _Way, function: _Way, *arguments: Any) -> Any:
        """Map `function` over the learners: at once, or one by one if ``torch.vmap`` refuses the function of `key`.

        Parameters
        ----------
        key : identifies the function.
        at_once : maps it at once.
        function : takes the arguments of one learner.
        *arguments : each with the axis of learners.
        """
        if key not in self._refused:
            try:
                return at_once(*arguments)
            except Exception as error:  # vmap's own errors have no class
                results = self._one_by_one(function, *arguments)  # raises the errors of the function itself
                self._refused.add(key)
                if function == self._call:
                    self.why_loop = reason(error)
                return results
        return self._one_by_one(function, *arguments)

    def _at_once(self, function: _Way, *arguments: Any) -> Any:
        return torch.vmap(function, randomness=self._randomness)(*arguments)

    def _call_at_once(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """Return the model's outputs, and change the buffers of the learners that take the step."""
        buffers = {name: tensors[name] for name, _ in self.module.named_buffers()}
        # Under vmap, batch_norm changes a copy of statistics that have gaps between the learners.
        held = {name: buffer.clone(memory_format=torch.contiguous_format) for name, buffer in buffers.items()}
        outputs = self._at_once(self._call, {**tensors, **held}, *inputs)
        rows = slice(None) if self.active is None else list(self.active)
        for name, buffer in buffers.items():
            buffer[rows] = held[name][rows]
        return outputs

    def _one_by_one(self, function: _Way, *arguments: Any) -> Any:
        parts = [_parts(argument, self.learners) for argument in arguments]
        results: dict[int, Any] = {}
        for row in range(self.learners) if self.active is None else self.active:
            with self._generator_of(row):
                results[row] = function(*(part[row] for part in parts))
        # Nobody reads the results of learners that wait.
        other = next(iter(results.values()))
        return tree_map(lambda *each: torch.stack(each), *(results.get(row, other) for row in range(self.learners)))

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """In the block, all learners run, one after the other, also those that wait.

        For models that need a number from a tensor for a while, as BatchNorm without momentum does.
        """
        before = self._refused, self.active
        self._refused, self.active = {False, True}, None
        try:
            yield
        finally:
            self._refused, self.active = before

    @contextmanager
    def _generator_of(self, row: int) -> Iterator[None]:
        """In the block, torch's generator is that of one learner."""
        if self.random_states is None:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.random_states[row])
        try:
            yield
        finally:
            self.random_states[row] = torch.get_rng_state()
            torch.set_rng_state(before)

    # -- one learner's state --------------------------------------------------------------------------------------

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return a copy of one learner's state, as the model's ``state_dict`` was before it was stacked."""
        own = self._state()
        return {
            name: own[name][row].clone() if name in own else value for name, value in self.module.state_dict().items()
        }

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the model's state that have the axis of learners."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        known = {**parameters, **dict(self.module.named_buffers(remove_duplicate=False))}
        return {name: value for name, value in self.module.state_dict().items() if name in known}

    def load_state_dict_of(self, row: int, state: Mapping[str, Any]) -> None:
        """Give one learner the state that `state_dict_of` returned.

        Raises
        ------
        RuntimeError
            If the state is of another model.
        """
        own = self._state()
        if own.keys() - state.keys() or state.keys() - self.module.state_dict().keys():
            raise RuntimeError(f"the state has {sorted(state)}, the model {sorted(own)}")
        for name, value in own.items():
            if value.shape[1:] != state[name].shape:
                raise RuntimeError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(value.shape[1:])}")
            value[row].copy_(state[name])


def _index(rows: Sequence[int]) -> slice | list[int]:
    """Return `rows`, which ascend, as an index; as a slice, whose part of a tensor is a view, if there are no gaps."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else list(rows)


def _repeat(tensor: Tensor, learners: int) -> Tensor:
    """Return `tensor` for every learner, each with the order of memory of `tensor`."""
    strides = (max(tensor.numel(), 1), *dense_strides(tensor))
    shape = (learners, *tensor.shape)
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _parts(argument: Tensor | Mapping[str, Tensor], learners: int) -> Sequence[Any]:
    """Return the part of every learner."""
    if isinstance(argument, Tensor):
        return argument.unbind()
    parts = {name: tensor.unbind() for name, tensor in argument.items()}
    return [{name: of_rows[row] for name, of_rows in parts.items()} for row in range(learners)]
