"""Tasks: a model, its data, a loss and an accuracy. A task is built in, or comes from a Python file of the user's.

A new built-in task is a module of this package with a function ``task``, and a line in `hpcavg.config.components`.
"""

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
    """Return the task that ``config.problem.task`` names: a built-in one, or ``path/to/file.py:function``.

    The function takes the configuration and returns a `Task`.

    Raises
    ------
    InputError
        If the file or function cannot be used, or the function raises an exception.

    Examples
    --------
    >>> from hpcavg.config.options import Config
    >>> load(Config(task="synthetic")).name
    'synthetic'
    """
    name = config.problem.task
    if name in TASKS:
        return importlib.import_module(f"hpcavg.tasks.{name.replace('-', '_')}").task(config)
    path, _, function_name = name.rpartition(":")
    module = _guarded(name, _import_file, Path(path))
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError("task", name, f"a function of that file; it has no {function_name!r}")
    task = _guarded(name, function, config)
    if not isinstance(task, Task):
        raise InputError("task", name, f"a function that returns a hpcavg.tasks.Task, not {type(task).__name__}")
    return task


def load_data(task: Task) -> Data:
    """Return the task's data, read and checked. Raises `InputError` if the task cannot provide it."""
    data = _guarded(task.name, task.load_data)
    if not isinstance(data, Data):
        kind = type(data).__name__
        raise InputError("task", task.name, f"a function load_data that returns a hpcavg.tasks.Data, not {kind}")
    data.check(task.name)
    return data


def build_model(task: Task) -> nn.Module:
    """Return the task's model. Raises `InputError` if the task cannot provide one with parameters to train."""
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
    """Call the user's `function`. Any exception becomes an `InputError` that names its file and line."""
    try:
        return function(*arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        allowed = f"a task that does not raise; {last.filename}:{last.lineno}: {reason}"
        raise InputError("task", name, allowed) from error
