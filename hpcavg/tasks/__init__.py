"""Tasks: a model, its data, a loss and an accuracy. Built in by name, or the user's own from a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hpcavg.config.components import TASKS
from hpcavg.config.options import Config
from hpcavg.data.samples import Data, Samples
from hpcavg.errors import InputError
from hpcavg.tasks.task import Task, count_correct, count_top5

__all__ = ["Data", "Samples", "Task", "build_model", "count_correct", "count_top5", "load", "load_data"]


def load(config: Config) -> Task:
    """Return the task that ``config.task`` names: a module of this package, or ``path/to/file.py:function``.

    The function is called with the configuration and returns a `Task`. Raises `InputError` when the file or function
    cannot be used, or when the function raises.
    """
    if config.task in TASKS:
        return importlib.import_module(f"hpcavg.tasks.{config.task}").task(config)
    path, _, function_name = config.task.rpartition(":")
    module = _guarded(config.task, _import_file, Path(path))
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError("task", config.task, f"a function of that file; it has no {function_name!r}")
    task = _guarded(config.task, function, config)
    if not isinstance(task, Task):
        raise InputError("task", config.task, f"a function that returns a hpcavg.tasks.Task, not {type(task).__name__}")
    return task


def load_data(task: Task) -> Data:
    """Return the task's data, read and checked; raises `InputError` where the task cannot give it."""
    data = _guarded(task.name, task.load_data)
    if not isinstance(data, Data):
        kind = type(data).__name__
        raise InputError("task", task.name, f"a function load_data that returns a hpcavg.tasks.Data, not {kind}")
    data.check(task.name)
    return data


def build_model(task: Task) -> nn.Module:
    """Return the task's model; raises `InputError` where the task cannot give one that can be trained."""
    model = _guarded(task.name, task.build_model)
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise InputError("task", task.name, "a task whose build_model returns a module with parameters to train")
    return model


def _import_file(path: Path) -> object:
    name = f"hpcavg_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _guarded(name: str, function: Callable[..., Any], *arguments: object) -> Any:
    """Call the user's `function`; whatever it raises becomes one line that says where."""
    try:
        return function(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        allowed = f"a task that does not raise; {last.filename}:{last.lineno}: {reason}"
        raise InputError("task", name, allowed) from error
