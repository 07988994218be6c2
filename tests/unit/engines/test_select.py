"""Which engine is chosen, and what is refused: the whole table."""

from types import SimpleNamespace

import pytest
import torch

from hpcavg import InputError
from hpcavg.engines.mpi import host_memory
from hpcavg.engines.select import Choice, Facts, choose_engine, find_facts

AWARE = {"is_cuda_aware": True, "how_known": "HPCAVG_CUDA_AWARE=1"}
UNAWARE = {"is_cuda_aware": False, "how_known": "MPIX_Query_cuda_support says 0"}


SHARED = "ranks 0 and 1 share a GPU, which NCCL refuses"


def cuda(nccl_obstacle=None, num_ranks=4, aware=UNAWARE):
    return Facts("cuda", num_ranks, nccl_obstacle=nccl_obstacle, **aware)


@pytest.mark.parametrize(
    ("requested", "facts", "engine", "host", "because"),
    [
        ("auto", Facts("cpu"), "auto", "auto", "on cpu"),
        ("mpi", Facts("cpu"), "mpi", "mpi", "on cpu"),
        ("shared", Facts("cpu"), "shared", "shared", "on cpu"),
        ("auto", cuda(), "nccl", "auto", "every rank has a GPU of its own"),
        ("auto", cuda(aware=AWARE), "nccl", "auto", "this torch has NCCL"),
        ("auto", cuda(num_ranks=1), "staged", "auto", "nothing to send"),
        ("auto", cuda(SHARED), "staged", "auto", f"{SHARED}; MPI takes host memory only (MPIX_Query_cuda_support says"),
        ("auto", cuda(SHARED, aware=AWARE), "cuda-aware", "auto", "MPI takes device memory (HPCAVG_CUDA_AWARE=1)"),
        ("auto", cuda("this torch has no NCCL", aware=AWARE), "cuda-aware", "auto", "no NCCL; MPI takes device memory"),
        ("auto", Facts("cuda", 4, compresses=True), "staged", "auto", "messages are compressed"),
        ("mpi", cuda(), "staged", "mpi", "mpi was asked for"),
        ("twolevel", cuda(aware=AWARE), "staged", "twolevel", "twolevel was asked for"),
        ("staged", cuda(), "staged", "auto", "asked for"),
        ("cuda-aware", cuda(aware=AWARE), "cuda-aware", "auto", "asked for"),
        ("nccl", cuda(), "nccl", "auto", "asked for"),
        ("nccl", cuda(num_ranks=1), "nccl", "auto", "asked for"),
    ],
)
def test_choices(requested, facts, engine, host, because):
    choice = choose_engine(requested, facts)
    assert (choice.engine, choice.host) == (engine, host)
    assert because in choice.reason
    assert "\n" not in choice.reason


ON_CPU = "must be one of auto, mpi, shared, twolevel for parameters on cpu"


@pytest.mark.parametrize(
    ("requested", "facts", "line"),
    [
        ("fast", cuda(), "must be one of auto, mpi, shared, twolevel, nccl, cuda-aware, staged"),
        ("cuda-ipc", cuda(), "must be one of auto, mpi, shared, twolevel, nccl, cuda-aware, staged"),
        ("staged", Facts("cpu"), ON_CPU),
        ("cuda-aware", Facts("cpu"), ON_CPU),
        ("nccl", Facts("cpu"), ON_CPU),
        (
            "cuda-aware",
            cuda(),
            "must be staged or auto: MPIX_Query_cuda_support says 0 (HPCAVG_CUDA_AWARE=1 if MPI takes device memory",
        ),
        ("nccl", cuda(SHARED), f"must be staged or auto: {SHARED}"),
    ],
)
def test_refusals(requested, facts, line):
    with pytest.raises(InputError) as raised:
        choose_engine(requested, facts)
    assert raised.value.as_option().startswith(f"--engine {requested}: {line}")


def test_no_device_memory_is_given_away_if_ranks_may_die():
    """One of them would leave the others waiting in it: means go through host memory, which survives."""
    all_ranks = SimpleNamespace(allgather=lambda kind: [kind] * 4)
    topology = SimpleNamespace(all_ranks=all_ranks, survives=True, num_learner_ranks=4)
    facts = find_facts("auto", topology, torch.device("cuda", 0))
    assert choose_engine("auto", facts).engine == "staged"
    for name in ("nccl", "cuda-aware"):
        with pytest.raises(InputError, match=r"staged or auto: .*does not survive the death of a rank"):
            choose_engine(name, facts)


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
