"""Cores, threads and NUMA nodes, by hand-made tables and folders."""

import pytest

from hpcavg.distributed import job_environment, launcher_variables
from hpcavg.machine.cores import cores_of_list, cpu_quota, numa_nodes, numa_nodes_of, share_of_cores

ALL = set(range(16))


@pytest.mark.parametrize(
    ("own", "of_all", "given", "share"),
    [
        (ALL, [ALL], None, 16),
        (ALL, [ALL] * 4, None, 4),
        (ALL, [ALL] * 3, None, 5),
        (ALL, [ALL] * 64, None, 1),
        ({0, 1}, [{0, 1}, {2, 3}], None, 2),
        ({0, 1}, [{0, 1}, {1, 2}, {2, 3}], None, 1),
        (ALL, [ALL], 4, 4),  # Slurm without binding: all cores are seen, four were given
        (ALL, [ALL] * 2, 4, 2),
        (ALL, [ALL] * 8, 4, 1),
        (ALL, [ALL] * 2, 32, 8),  # hardware threads were counted
        ({0, 1, 2}, [{0, 1, 2}, {3}], 4, 3),  # bound unequally, within what was given
    ],
)
def test_a_rank_has_a_share_of_the_cores(own, of_all, given, share):
    assert share_of_cores(own, of_all, given) == share


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({}, None),
        ({"SLURM_CPUS_ON_NODE": "4"}, 4),
        ({"SLURM_CPUS_ON_NODE": ""}, None),
        ({"LSB_MCPU_HOSTS": "batch5 1 h41n09 42 h41n10.site 40"}, 42),
        ({"LSB_MCPU_HOSTS": "batch5 1 h41n10 42"}, None),
        ({"LSB_MCPU_HOSTS": "h41n09"}, None),
    ],
)
def test_the_scheduler_says_how_many_cores_a_job_has(environ, given):
    assert job_environment.cores_given(environ, "h41n09.site.org") == given


@pytest.mark.parametrize(
    ("environ", "allowed"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "4", "SLURM_CPUS_PER_TASK": "2"}, 2),
    ],
)
def test_the_job_script_may_want_fewer_threads(environ, allowed):
    assert job_environment.threads_allowed(environ) == allowed


@pytest.mark.parametrize(
    ("environ", "name", "job"),
    [
        ({}, "none", None),
        ({"PRTE_LAUNCHED": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "17"}, "mpirun", "Slurm job 17"),
        ({"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "17", "PMIX_RANK": "0"}, "srun", "Slurm job 17"),
        ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}, "none", "Slurm job 17"),
        ({"JSM_NAMESPACE_SIZE": "6", "OMPI_UNIVERSE_SIZE": "6", "LSB_JOBID": "3"}, "jsrun", "LSF job 3"),
    ],
)
def test_the_launcher_and_the_scheduler_are_known(environ, name, job):
    assert (launcher_variables.launcher_name(environ), job_environment.scheduler_job(environ)) == (name, job)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_quota_of_a_container_counts(tmp_path):
    own = tmp_path / "cgroup"
    version_2 = write(tmp_path / "2")
    write(version_2 / "pods", cpu__max="250000 100000\n")
    write(version_2 / "pods" / "mine", cpu__max="max 100000\n")
    own.write_text("0::/pods/mine\n")
    assert cpu_quota(version_2, own) == 2
    write(version_2 / "pods" / "mine", cpu__max="50000 100000\n")
    assert cpu_quota(version_2, own) == 1
    own.write_text("0::/elsewhere\n")
    assert cpu_quota(version_2, own) is None
    version_1 = tmp_path / "1"
    write(version_1 / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    write(version_1 / "cpu" / "job", cpu__cfs_quota_us="400000\n", cpu__cfs_period_us="100000\n")
    own.write_text("3:cpuset:/\n1:cpu,cpuacct:/job\n0::/\n")
    assert cpu_quota(version_1, own) == 4
    assert cpu_quota(version_1, tmp_path / "none") is None


def test_numa_nodes_are_those_of_a_ranks_cores(tmp_path):
    write(tmp_path / "node0", cpulist="0-3,8-11\n")
    write(tmp_path / "node1", cpulist="4-7,12\n")
    write(tmp_path / "node2", cpulist="\n")  # memory alone
    nodes = numa_nodes(tmp_path)
    assert nodes == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12}}
    assert numa_nodes_of({1, 2}, nodes) == (0,)
    assert numa_nodes_of({3, 4}, nodes) == (0, 1)
    assert numa_nodes_of({12}, nodes) == (1,)
    assert numa_nodes(tmp_path / "none") == {}
    with pytest.raises(ValueError, match="invalid literal"):
        cores_of_list("0-x")
