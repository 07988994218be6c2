"""Forward and backward passes: loss, mixed precision, memory order, compilation and gradient clipping of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpcavg.averaging.stacked import Stacked
from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError
from hpcavg.tasks import Task
from hpcavg.utils.text import printable

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ForwardBackward:
    """The forward and backward passes of a rank's learners.

    If the model is stacked, inputs, outputs and losses have an axis for the learners, the first.

    Parameters
    ----------
    config : Config
        Its ``precision``, ``channels_last``, ``compile``, ``clip_norm`` and ``label_smoothing``.
    task : Task
        Its loss.
    model : Module
        On its device.
    optimizer : Optimizer
        Of the model's parameters.

    Attributes
    ----------
    loss : callable
        Maps (output, target) to the training loss.
    scaler : GradScaler or None
        Scales the loss up, so that float16 keeps small gradients; None for other precisions.

    Raises
    ------
    InputError
        If the model or the task does not support an option.
    """

    def __init__(self, config: Config, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._device = next(model.parameters()).device
        self._precision = _AUTOCAST.get(config.run.precision)
        self._channels_last = config.run.channels_last
        self.loss = _training_loss(task, config.optimization.label_smoothing)
        self.scaler = torch.amp.GradScaler(self._device.type) if config.run.precision == "fp16" else None
        self._network, self._model = model, cast(Callable[[Tensor], Tensor], model)
        self._stacked = model if isinstance(model, Stacked) else None
        if config.run.channels_last:
            cast(Any, model).to(memory_format=torch.channels_last)  # torch's annotations lack this form
        if config.run.compile:
            self._model = torch.compile(model)
        if config.optimization.clip_norm is not None:
            # Right before the step: gradients are averaged and unscaled by then.
            norm = config.optimization.clip_norm
            optimizer.register_step_pre_hook(_clipping(norm, None if self._stacked is None else optimizer))

    def compile(self, batch: Callable[[], tuple[Tensor, Tensor]], topology: Topology) -> None:
        """Let torch compile the passes for a mini-batch like that of `batch`. The model stays as it is.

        Collective over all ranks. Raises `InputError` on all of them if any cannot compile.
        """
        if topology.rank == 0:
            print("compiling the model (minutes for a deep network)", flush=True)
        topology.run_on_all_ranks(lambda: None if topology.is_server else self._compile(*batch()))

    def _compile(self, inputs: Tensor, targets: Tensor) -> None:
        from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
        from torch._inductor.exc import CppCompileError

        try:
            with self._without_trace():
                self.gradients(inputs, targets)
        except TorchRuntimeError:  # the model's own error, which it would raise uncompiled, too
            raise
        except (TorchDynamoException, CppCompileError) as error:
            found = printable(" ".join(str(error).partition("\nSet TORCH")[0].split()), 300)
            allowed = f"left out where torch cannot compile: {found}; CPUs need a C++ compiler, which CXX may name"
            raise InputError("compile", True, allowed) from error

    def attempt(self, inputs: Tensor, training: bool = True) -> Tensor:
        """Return the output of the uncompiled model, without a graph. The model stays as it is."""
        self._network.train(training)
        with self._without_trace(), torch.no_grad():
            return self._output(self._network, inputs)

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """After the block, restore the model's buffers, such as BatchNorm statistics, and clear its gradients."""
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            yield
        finally:
            self._network.zero_grad()
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer  # a pass may have put another in its place
                    buffer.copy_(before)

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the model's output, in float32 if the precision is mixed."""
        return self._output(self._model, inputs)

    def predict_of(self, rows: slice, inputs: Tensor) -> Tensor:
        """Return the outputs of several learners' models, of a rank that has several."""
        assert self._stacked is not None
        return self._output(partial(self._stacked.outputs_of, rows), inputs)

    def _output(self, model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if self._channels_last and inputs.ndim == 4:
            inputs = inputs.to(memory_format=torch.channels_last)
        with self._autocast():
            output = model(inputs)
        return output.float() if self._precision is not None else output

    def gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of a mini-batch's loss to those of the parameters.

        Returns
        -------
        Tensor
            The loss, a scalar; of several learners, their losses, shape (learners,).
        """
        if self._stacked is not None and self._precision is None:
            return self._stacked.gradients(self.loss, inputs, targets)
        if self._stacked is not None:  # only the forward pass is to be in mixed precision
            losses = cast(Tensor, self._stacked.each(self.loss, self.predict(inputs), targets))
            losses.sum().backward()  # the gradients of a learner's parameters are those of its own loss
            return losses
        loss = self.loss(self.predict(inputs), targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def end_step(self) -> None:
        """Update the loss's scale after the optimizer's step."""
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the state of the loss's scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._precision, enabled=self._precision is not None)


def _training_loss(task: Task, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    if not label_smoothing:
        return task.loss
    if task.loss is not cross_entropy:
        raise InputError("label_smoothing", label_smoothing, "0 for a task whose loss is not torch's cross_entropy")
    return lambda output, target: cross_entropy(output, target, label_smoothing=label_smoothing)


def _clipping(norm: float, stacked: torch.optim.Optimizer | None) -> Callable[..., None]:
    """Return a hook of an optimizer that scales its gradients down to `norm` if their norm is larger.

    `stacked` is an optimizer whose parameters have an axis for learners, each of which has a norm of its own. An
    optimizer of one learner may have the hook, too.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if optimizer is not stacked:
            nn.utils.clip_grad_norm_(parameters, norm)
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack(
            [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients]
        )
        # As torch's clip_grad_norm_ does for one learner.
        factors = (norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))

    return clip
