"""Which engine is chosen, and what is refused: the whole table."""

from types import SimpleNamespace

import pytest
import torch

from hpcavg import InputError
from hpcavg.engines.mpi import host_memory
from hpcavg.engines.select import Choice, Facts, choose_engine

AWARE = {"is_cuda_aware": True, "how_known": "HPCAVG_CUDA_AWARE=1"}
UNAWARE = {"is_cuda_aware": False, "how_known": "MPIX_Query_cuda_support says 0"}


def cuda(num_nodes=1, ipc_obstacle=None, num_ranks=4, aware=UNAWARE):
    return Facts("cuda", num_ranks, num_nodes, ipc_obstacle=ipc_obstacle, **aware)


@pytest.mark.parametrize(
    ("requested", "facts", "engine", "host", "because"),
    [
        ("auto", Facts("cpu"), "auto", "auto", "on cpu"),
        ("mpi", Facts("cpu"), "mpi", "mpi", "on cpu"),
        ("shared", Facts("cpu"), "shared", "shared", "on cpu"),
        ("auto", cuda(), "cuda-ipc", "auto", "read each other's device memory"),
        ("auto", cuda(aware=AWARE), "cuda-ipc", "auto", "on one node"),
        ("auto", cuda(num_ranks=1), "staged", "auto", "nothing to send"),
        ("auto", cuda(1, "no peer access"), "staged", "auto", "no peer access"),
        ("auto", cuda(1, "no peer access", aware=AWARE), "staged", "auto", "no peer access"),
        ("auto", cuda(2, "2 nodes"), "staged", "auto", "MPI takes host memory only (MPIX_Query_cuda_support says 0)"),
        ("auto", cuda(2, "2 nodes", aware=AWARE), "cuda-aware", "auto", "takes device memory (HPCAVG_CUDA_AWARE=1)"),
        ("mpi", cuda(), "staged", "mpi", "mpi was asked for"),
        ("twolevel", cuda(2, "2 nodes", aware=AWARE), "staged", "twolevel", "twolevel was asked for"),
        ("staged", cuda(2, "2 nodes"), "staged", "auto", "asked for"),
        ("cuda-aware", cuda(2, "2 nodes", aware=AWARE), "cuda-aware", "auto", "asked for"),
        ("cuda-ipc", cuda(), "cuda-ipc", "auto", "asked for"),
    ],
)
def test_choices(requested, facts, engine, host, because):
    choice = choose_engine(requested, facts)
    assert (choice.engine, choice.host) == (engine, host)
    assert because in choice.reason
    assert "\n" not in choice.reason


def test_only_a_node_whose_ranks_cannot_share_is_warned_of():
    choice = choose_engine("auto", cuda(1, "no peer access"))
    assert choice.warning.endswith("no peer access; means go through host memory")
    for requested, facts in [("auto", cuda()), ("auto", cuda(2, "2 nodes")), ("staged", cuda(1, "not tried"))]:
        assert choose_engine(requested, facts).warning is None


@pytest.mark.parametrize(
    ("requested", "facts", "line"),
    [
        (
            "fast",
            cuda(),
            "--engine fast: must be one of auto, mpi, shared, twolevel, staged, cuda-aware, cuda-ipc",
        ),
        ("staged", Facts("cpu"), "--engine staged: must be one of auto, mpi, shared, twolevel for parameters on cpu"),
        ("cuda-aware", Facts("cpu"), "--engine cuda-aware: must be one of auto, mpi, shared, twolevel for parameters"),
        ("cuda-ipc", Facts("cpu"), "--engine cuda-ipc: must be one of auto, mpi, shared, twolevel for parameters"),
        (
            "cuda-aware",
            cuda(2),
            "--engine cuda-aware: must be staged or auto: MPIX_Query_cuda_support says 0 (HPCAVG_CUDA_AWARE=1 if",
        ),
        (
            "cuda-ipc",
            cuda(2, "the ranks are on 2 nodes"),
            "--engine cuda-ipc: must be staged or auto: the ranks are on 2 nodes",
        ),
    ],
)
def test_refusals(requested, facts, line):
    with pytest.raises(InputError) as raised:
        choose_engine(requested, facts)
    assert raised.value.as_option().startswith(line)


def test_a_choice_for_the_host_is_the_engine_that_was_asked_for():
    assert choose_engine("mpi", Facts("cpu")) == Choice("mpi", "mpi", "the parameters are on cpu")


@pytest.mark.parametrize(
    "values",
    [SimpleNamespace(device=torch.device("cuda", 0), numpy=list), torch.empty(3, device="meta")],
    ids=["cuda", "meta"],
)
def test_no_device_memory_reaches_a_non_blocking_collective(values):
    with pytest.raises(InputError, match="must be cpu for what MPI works on in the background"):
        host_memory(values)


def test_host_memory_is_handed_on_without_a_copy():
    values = torch.arange(3.0)
    assert host_memory(values).ctypes.data == values.data_ptr()


def test_an_environment_variable_is_named_as_the_shell_does():
    error = InputError("HPCAVG_CUDA_AWARE", "yes", "0 or 1")
    assert error.as_option() == "HPCAVG_CUDA_AWARE=yes: must be 0 or 1"
