"""What is registered exists, and what exists is registered: help, lists and errors are made from it."""

import importlib
import pkgutil

import pytest

from hpcavg import engines, tasks
from hpcavg.cli import parsers
from hpcavg.config import components
from hpcavg.config.options import OPTIONS, Config
from hpcavg.engines.compression import WIRE_DTYPES
from hpcavg.engines.select import choose_engine
from hpcavg.errors import InputError


def modules_of(package):
    return {module.name for module in pkgutil.iter_modules(package.__path__)}


def test_every_task_is_registered_and_makes_itself():
    modules = {name.replace("-", "_") for name in components.TASKS}
    assert modules_of(tasks) - {"task"} == modules
    for name in modules:
        assert callable(importlib.import_module(f"hpcavg.tasks.{name}").task)


def test_the_engines_for_host_memory_are_there_under_their_names():
    for name, engine in components.HOST_ENGINES.items():
        assert pkgutil.resolve_name(engine.maker).name == name


def test_the_engines_for_devices_are_there():
    classes = {
        "nccl": "gpu.nccl:NcclEngine",
        "cuda-aware": "gpu.cuda_aware:CudaAwareEngine",
        "staged": "staged:StagedEngine",
    }
    assert classes.keys() == components.DEVICE_ENGINES.keys()
    for maker in classes.values():
        assert callable(pkgutil.resolve_name(f"{engines.__name__}.{maker}"))
    assert not set(components.FORMER_ENGINES) & set(components.ENGINES)


def test_every_action_of_a_data_set_is_in_its_module():
    for name, actions in components.DATASETS.items():
        module = importlib.import_module(f"hpcavg.data.{name}")
        assert all(callable(getattr(module, action)) for action in actions)
    assert parsers.DATASETS["check"] == ["imagenet"]


@pytest.mark.parametrize(("flag", "known"), [("--engine", components.ENGINES), ("--task", components.TASKS)])
def test_what_is_registered_is_listed_with_a_text(flag, known):
    lines = parsers.listing([flag, "help"]).splitlines()
    assert [line.split()[0] for line in lines] == list(known)
    assert all(len(line.split()) > 1 for line in lines)
    assert parsers.listing([flag, next(iter(known))]) is None


def test_an_unknown_engine_is_refused_with_the_same_list_by_options_and_engines():
    with pytest.raises(InputError) as early:
        Config(engine="fast")
    with pytest.raises(InputError) as late:
        choose_engine("fast", None)
    assert str(early.value) == str(late.value)
    assert OPTIONS["engine"].choices == tuple(components.ENGINES)


@pytest.mark.parametrize("name", WIRE_DTYPES)
def test_the_types_that_engines_compress_to_are_those_of_the_options(name):
    assert Config(wire_dtype=name).averaging.wire_dtype == name
