"""Ranks that MPI believes to be alone, in the environments of all launchers: noticed, and reported once."""

import pytest
from mpi4py import MPI

import hpcavg
from hpcavg.distributed import job_environment, launcher_variables
from hpcavg.errors import InputError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
# What each launcher says to one of several; the others that it tells of.
SEVERAL = [
    (TORCHRUN, "the 2 ranks of WORLD_SIZE"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "the 2 ranks of WORLD_SIZE"),  # deepspeed, on two nodes
    (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "the 2 ranks of WORLD_SIZE"),
    ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, "the 3 ranks of OMPI_COMM_WORLD_SIZE"),
    ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "the 2 ranks of MV2_COMM_WORLD_SIZE"),
    ({"MV2_COMM_WORLD_SIZE": "2"}, "the 2 ranks of MV2_COMM_WORLD_SIZE"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "the 2 ranks of PMI_SIZE"),
    ({"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}, "the 2 ranks of MPI_LOCALNRANKS"),
    ({"JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_RANK": "5"}, "the 6 ranks of JSM_NAMESPACE_SIZE"),
    ({"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "0"}, "the 4 ranks of FLUX_JOB_SIZE"),
    ({"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "2"}, "the 2 ranks of PALS_LOCAL_SIZE"),
    ({"PALS_RANKID": "1", "PALS_LOCAL_SIZE": "1"}, "the others of PALS_RANKID=1"),  # one on each node
    ({"ALPS_APP_PE": "3"}, "the others of ALPS_APP_PE=3"),
    ({"PMIX_RANK": "1"}, "the others of PMIX_RANK=1"),
    ({"PMIX_RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "the 2 ranks of SLURM_STEP_NUM_TASKS"),
]
ONE = [
    {},
    TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    {"WORLD_SIZE": "4"},  # of a user's own script
    {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "NODE_RANK": "0"},  # Lightning's
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"},
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
    {"PMI_SIZE": "1", "PMI_RANK": "0", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"},
    {"PALS_RANKID": "0", "PALS_LOCAL_SIZE": "1"},
    {"ALPS_APP_PE": "0"},
    {"PMI_SIZE": "many"},
]
ALLOCATIONS = [
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "the 4 ranks of SLURM_NTASKS"),  # python in the shell of salloc
    ({"SLURM_NPROCS": "4"}, "the 4 ranks of SLURM_NPROCS"),
]


@pytest.fixture
def environment(monkeypatch):
    """Return a function that makes an environment this process's own."""
    for name in {*launcher_variables.RANKS, *launcher_variables.ALLOCATED}:
        monkeypatch.delenv(name, raising=False)

    def take(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return take


@pytest.mark.parametrize(("variables", "others"), SEVERAL)
def test_one_of_several_is_noticed_by_command_line_and_library(environment, variables, others):
    environment(variables)
    with pytest.raises(InputError, match=f"expect_ranks='unset': must be given, or {others} seen by MPI too") as error:
        job_environment.check_ranks(1, None)
    assert "start with mpirun or srun --mpi=pmix" in error.value.as_option()
    with pytest.raises(InputError, match=f"must be MPI.COMM_SELF if one rank is meant: MPI does not see {others}"):
        hpcavg.Topology()
    hpcavg.Topology(MPI.COMM_SELF).free()
    job_environment.check_ranks(1, 1)
    job_environment.check_ranks(2, None)


@pytest.mark.parametrize("variables", ONE)
def test_one_alone_is_left_alone(environment, variables):
    environment(variables)
    job_environment.check_ranks(1, None)
    hpcavg.Topology().free()


@pytest.mark.parametrize(("variables", "others"), ALLOCATIONS)
def test_a_job_with_room_for_several_is_a_mistake_of_the_command_line_alone(environment, variables, others):
    environment(variables)
    with pytest.raises(InputError, match=others):
        job_environment.check_ranks(1, None)
    hpcavg.Topology().free()


@pytest.mark.parametrize(
    "ranks",
    [
        [{"PMI_RANK": "0", "PMI_SIZE": "2"}, {"PMI_RANK": "1", "PMI_SIZE": "2"}],
        [{"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)} for rank in range(3)],
        [{"ALPS_APP_PE": str(rank)} for rank in range(3)],  # the first knows of no others and trains
        [{"PALS_RANKID": str(rank), "PALS_LOCAL_SIZE": "1", "PMIX_RANK": str(rank)} for rank in range(3)],
        [{"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": str(rank)} for rank in range(2)],
        [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"} for rank in range(2)],
    ],
)
def test_of_those_that_know_of_others_one_says_so(ranks):
    refused = [variables for variables in ranks if launcher_variables.find_other_ranks(variables, True) is not None]
    assert len(refused) >= len(ranks) - 1
    assert [launcher_variables.reports_lone_ranks(variables) for variables in refused] == [True] + [False] * (
        len(refused) - 1
    )


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (TORCHRUN, "torchrun"),
        ({"MPI_LOCALNRANKS": "2", "SLURM_STEP_ID": "0"}, "mpirun"),
        ({"PMI_SIZE": "2", "SLURM_STEP_ID": "0"}, "srun"),
        ({"PALS_RANKID": "0"}, "mpiexec"),
    ],
)
def test_who_started_the_ranks(variables, name):
    assert launcher_variables.launcher_name(variables) == name


def test_a_launcher_that_is_gone():
    server = {"PMIX_SERVER_URI41": "prterun.0;tcp4://127.0.0.1:1"}
    job_environment.require_pmix_server({"PMIX_RANK": "0", "PMIX_NAMESPACE": "a"} | server)
    job_environment.require_pmix_server({"PMIX_VERSION": "5"})
    for name in ("PMIX_RANK", "PMIX_NAMESPACE"):
        with pytest.raises(InputError, match=name):
            job_environment.require_pmix_server({name: "0"})
