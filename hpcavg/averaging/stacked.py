"""Many learners in one rank: a model whose parameters and buffers have a leading axis of learners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from hpcavg.averaging.flat_buffer import dense_strides, tied
from hpcavg.averaging.learners_as_channels import IMAGES, STATISTICS, LearnersAsChannels
from hpcavg.averaging.model_parts import is_plain
from hpcavg.errors import InputError, reason, require_integer

_EXACT, _FAST = "exact", "fast"
_SEVERAL = "where a rank has several learners"
# What the backward passes of the learners that run at once may keep: it should stay in the cache.
_KEPT_BYTES = 16 * 2**20
_LEAST_AT_ONCE = 32
# What is merged where learners run at once, in the order in which it is tried; at last they run in a loop.
_MERGED = (IMAGES, STATISTICS)
_LOOP = len(_MERGED)


class _Work(NamedTuple):
    """What is done for each of some learners.

    Attributes
    ----------
    key : identifies the function; the mode of training identifies the model.
    rows : the learners' rows.
    function : takes the tensors of one learner by name, whose buffers it may change, and its arguments.
    parameters : with an axis for these learners.
    buffers : with the axis of all learners.
    arguments : each with an axis for these learners.
    """

    key: object
    rows: Sequence[int]
    function: Callable[..., Any]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    arguments: Sequence[Tensor]


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
    random_states : the state of every learner's generator, as of ``torch.get_rng_state``, for models whose learners run
        one after the other. None: all draw from torch's own generator.
    active : the rows of the learners that take the next step. The buffers and generators of the others stay as they
        are; they run in evaluations only. None: all learners do.
    """

    def __init__(self, model: torch.nn.Module, learners: int, randomness: str = _EXACT) -> None:
        super().__init__()
        self.learners = learners
        self.random_states: list[Tensor] | None = None
        self.active: Sequence[int] | None = None
        self._randomness = "different" if randomness == _FAST else "error"
        # Of functions, and of the model by its mode of training: the way in which it runs, and why not in earlier ones.
        self._ways: dict[object, int] = {}
        self._why: dict[object, str] = {}
        self._sizes: dict[object, int] = {}
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
                self._ways = dict.fromkeys((True, False), _LOOP)
                self._why[True] = "torch.vmap leaves out the padding of Embedding(padding_idx) for one learner only"
        for _, tensors in tied(named):
            repeated = _repeat(tensors[0].detach(), learners)
            for tensor in tensors:
                tensor.grad = None
                tensor.data = repeated
        self.module = model
        own = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        # Every place of a tensor in a module, with the tensor's first name: a module may have several names, too.
        self._places = {
            f"{prefix}.{name}" if prefix else name: own[id(tensor)]
            for prefix, module in model.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }
        # glibc keeps freed memory for the next step, up to twice the largest block that was freed, of 32 MiB at most.
        # Without this one, a step of a small CNN spends an eighth of its time on fresh pages.
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")

    @property
    def why_loop(self) -> str | None:
        """Why the learners run one after the other; None if they run at once."""
        return next((self._why[mode] for mode in (True, False) if self._ways.get(mode) == _LOOP), None)

    # -- running --------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> Any:
        """Return the outputs of all learners; zeros for those that wait.

        Parameters
        ----------
        *inputs : the model's arguments, each with the axis of learners.
        """
        self._check_axis("inputs", *inputs)
        rows = self._rows()
        return self._for_all(rows, self.outputs_of(rows, *(_part(argument, rows) for argument in inputs)))

    def each(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Return the results of `function` for all learners, stacked, such as their losses, shape (R,); see `forward`.

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
        rows, key = self._rows(), getattr(function, "__code__", function)
        arguments = [_part(tensor, rows) for tensor in tensors]
        work = _Work(key, rows, lambda _, *parts: function(*parts), {}, {}, arguments)
        return self._for_all(rows, self._map(work))

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

        def loss_of(tensors: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return loss(self._call(tensors, inputs), targets)

        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        losses: list[Tensor] = []
        gradients: dict[str, Tensor] = {}
        rows = self._rows()
        size = self._learners_at_once(loss_of, inputs, targets)
        done = 0
        while done < len(rows):
            chunk = rows[done : done + size]
            parts = {name: _part(p.detach(), chunk).requires_grad_(p.requires_grad) for name, p in parameters.items()}
            trained = {name: part for name, part in parts.items() if part.requires_grad}
            arguments = [_part(inputs, chunk), _part(targets, chunk)]
            work = _Work(self.training, chunk, loss_of, parts, buffers, arguments)
            found = self._at_once(work) if len(chunk) > 1 else self._one_by_one(work)
            if found is None:
                size = 1
                continue
            of_chunk = torch.autograd.grad(found.sum(), list(trained.values()), allow_unused=True)
            used = {name: gradient for name, gradient in zip(trained, of_chunk, strict=True) if gradient is not None}
            if losses and used.keys() != gradients.keys():
                allowed = f"one that uses the same parameters each time, {_SEVERAL}"
                raise InputError("model", type(self.module).__name__, allowed)
            if len(chunk) == self.learners:
                gradients = used
            for name, gradient in used.items():
                if name not in gradients:
                    gradients[name] = torch.zeros_like(parameters[name])
                if gradients[name] is not gradient:
                    gradients[name][_index(chunk)] = gradient
            losses.append(found.detach())
            done += len(chunk)
        for name, gradient in gradients.items():
            parameter = parameters[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return self._for_all(rows, torch.cat(losses), torch.nan)

    def _learners_at_once(self, loss_of: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> int:
        """Return how many learners take their gradients at once.

        A trial of one learner counts the bytes that the backward pass keeps for inputs of this shape; it changes
        nothing.
        """
        if self._ways.get(self.training) == _LOOP:
            return 1
        key = self.training, inputs.shape[1:]
        if self.learners > _LEAST_AT_ONCE and key not in self._sizes:
            kept: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                kept[tensor.data_ptr()] = tensor.nbytes
                return tensor

            tensors = {name: tensor[0].clone() for name, tensor in self.module.named_buffers()}
            own = {name: tensor[0] for name, tensor in self.module.named_parameters()}
            with (
                torch.random.fork_rng(devices=[]),
                torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            ):
                loss_of({**own, **tensors}, inputs[0], targets[0])
            of_one = sum(kept.values()) - sum(kept.get(tensor.data_ptr(), 0) for tensor in own.values())
            num_chunks = math.ceil(self.learners / max(_LEAST_AT_ONCE, int(_KEPT_BYTES / max(of_one, 1))))
            self._sizes[key] = math.ceil(self.learners / num_chunks)
        return self._sizes.get(key, self.learners)

    def outputs_of(self, rows: slice | Sequence[int], *inputs: Tensor) -> Any:
        """Return the outputs of the learners in these rows.

        Parameters
        ----------
        rows : the rows, ascending.
        *inputs : the model's arguments, with an axis for these learners.
        """
        rows = range(self.learners)[rows] if isinstance(rows, slice) else rows
        parameters = {name: _part(parameter, rows) for name, parameter in self.module.named_parameters()}
        return self._map(_Work(self.training, rows, self._call, parameters, dict(self.module.named_buffers()), inputs))

    def learner(self, row: int) -> Callable[..., Any]:
        """Return one learner's model as a function, whose inputs have no axis of learners."""
        tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return lambda *inputs: self._call({name: tensor[row] for name, tensor in tensors.items()}, *inputs)

    def _rows(self) -> Sequence[int]:
        """Return the rows of the learners that run: in evaluations, and when the run is over, all."""
        return self.active if self.training and self.active else range(self.learners)

    def _check_axis(self, what: str, *tensors: Any) -> None:
        """Raise `InputError` unless the first axis of all tensors is that of the learners."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape[:1] != (self.learners,):
                raise InputError(what, tuple(tensor.shape), f"of shape ({self.learners}, ...), for as many learners")

    def _for_all(self, rows: Sequence[int], results: Any, value: float = 0.0) -> Any:
        """Return `results`, of the learners in these rows, with the axis of all; the others have `value`."""
        if len(rows) == self.learners:
            return results

        def of_all(result: Tensor) -> Tensor:
            whole = result.new_full((self.learners, *result.shape[1:]), value)
            return whole.index_copy(0, torch.as_tensor(rows, device=result.device), result)

        return tree_map(of_all, results)

    def _call(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        """Return the model's output with these tensors. Buffers that it exchanges (``module.b = new``) are kept."""
        held = {place: tensors[name] for place, name in self._places.items()}
        output = functional_call(self.module, held, inputs, tie_weights=False)
        for place, name in self._places.items():
            if held[place] is not tensors[name]:
                tensors[name].copy_(held[place])
        return output

    def _map(self, work: _Work) -> Any:
        """Return the results for the learners, stacked: at once, or one by one if ``torch.vmap`` refuses."""
        results = self._at_once(work) if len(work.rows) > 1 else None
        return self._one_by_one(work) if results is None else results

    def _at_once(self, work: _Work) -> Any:
        """Return what `_map` does; None if ``torch.vmap`` refuses the function, which has changed nothing then."""
        key, rows, buffers = work.key, work.rows, work.buffers
        for way in range(self._ways.get(key, 0), _LOOP):
            # Under vmap, batch_norm changes a copy of statistics that have gaps between the learners.
            held = {name: _part(b, rows).clone(memory_format=torch.contiguous_format) for name, b in buffers.items()}
            try:
                with LearnersAsChannels(_MERGED[way]):
                    mapped = torch.vmap(work.function, randomness=self._randomness)
                    results = mapped({**work.parameters, **held}, *work.arguments)
            except Exception as error:  # vmap's own errors have no class; those of the function come up again
                self._why[key] = reason(error)
                continue
            for name, buffer in buffers.items():
                buffer[_index(rows)] = held[name]
            self._ways[key] = way
            return results
        return None

    def _one_by_one(self, work: _Work) -> Any:
        """Return what `_map` does."""
        each = []
        for place, row in enumerate(work.rows):
            own = {name: tensor[place] for name, tensor in work.parameters.items()}
            own |= {name: buffer[row] for name, buffer in work.buffers.items()}
            with self._generator_of(row):
                each.append(work.function(own, *(argument[place] for argument in work.arguments)))
        if work.key in self._why and work.key not in self._ways:  # refused, and not because the function fails
            self._ways[work.key] = _LOOP
        return tree_map(lambda *results: torch.stack(results), *each)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """In the block, all learners run, one after the other, also those that wait.

        For models that need a number from a tensor for a while, as BatchNorm without momentum does.
        """
        before = self._ways, self.active
        self._ways, self.active = dict.fromkeys((True, False), _LOOP), None
        try:
            yield
        finally:
            self._ways, self.active = before

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


def _part(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the part of `tensor` for the learners in these rows; `tensor` if that is all of it."""
    return tensor if len(rows) == len(tensor) else tensor[_index(rows)]


def _repeat(tensor: Tensor, learners: int) -> Tensor:
    """Return `tensor` for every learner, each with the order of memory of `tensor`."""
    strides = (max(tensor.numel(), 1), *dense_strides(tensor))
    shape = (learners, *tensor.shape)
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
