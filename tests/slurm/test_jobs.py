"""The scripts in jobs/, submitted to a real Slurm: they end as they say, and train what any other run does.

Slurm looks at limits every half a minute alone, so jobs that meet theirs are submitted first and looked at last.
"""

import json
import subprocess
import sys
import time

import pytest

# What all jobs train, on two ranks: where these are, what started them and what stopped them must not show.
TRAINING = ["--task", "tests/slurm/slow.py:task", "--algorithm", "k-avg", "--model", "mlp", "--steps", "200"]
ONE_NODE = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
# Slurm warns when it looks for the first time 15 to 45 s after the start, so that the ranks have begun.
MINUTE = ["--time=1", "--signal=B:USR1@15"]
TIMEOUT_S = 240


class Jobs:
    """Submits the shipped scripts; runs are written to `folder`."""

    def __init__(self, slurm, folder):
        self.slurm = slurm
        self.folder = folder

    def submit(self, script, *arguments, options, launcher="mpirun", **variables):
        variables = {"HPCAVG_RUNS": self.folder, "HPCAVG_LAUNCHER": launcher, **variables}
        return self.slurm.submit(f"jobs/{script}.sbatch", *arguments, options=options, variables=variables)

    def ends(self, job, state="COMPLETED", status=0):
        """Wait for a job's end, check how that is and return its log."""
        known = self.slurm.wait(job, TIMEOUT_S)
        log = self.slurm.log(job)
        assert (known["JobState"], known["ExitCode"]) == (state, f"{status}:0"), log
        return log

    def until(self, job, text):
        """Wait until the job has written `text`."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.slurm.log(job):
            assert time.monotonic() < deadline, self.slurm.log(job)
            time.sleep(0.3)

    def summary(self, *names):
        summary = json.loads(self.folder.joinpath(*names, "summary.json").read_text())
        assert summary["completed"] is True
        return summary


@pytest.fixture(scope="module")
def jobs(slurm, tmp_path_factory):
    return Jobs(slurm, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", autouse=True)
def with_limits(jobs):
    """Jobs that cannot end within their limits, by name."""
    # hpcavg itself would stop a stop margin before the limit, long before Slurm warns; 0: it stops when Slurm does.
    patient = [*TRAINING, "--stop-margin", "0"]
    return {
        "requeued mpirun": jobs.submit("requeue", *patient, options=[*MINUTE, *TWO_NODES], STEP_S=0.6),
        "requeued srun": jobs.submit("requeue", *patient, options=[*MINUTE, *ONE_NODE], launcher="srun", STEP_S=0.6),
        "stopped": jobs.submit("train", *patient, options=[*MINUTE, *ONE_NODE], STEP_S=0.6),
        "hanging": jobs.submit("train", *patient, options=[*MINUTE, *ONE_NODE], STEP_S=600),
    }


@pytest.fixture(scope="module")
def whole(jobs):
    """Return the summary of a run that nothing has disturbed, started by mpirun on two nodes."""
    job = jobs.submit("train", *TRAINING, options=TWO_NODES)
    jobs.ends(job)
    return jobs.summary(f"hpcavg-train-{job}")


def test_mpirun_and_srun_train_the_same(jobs, whole):
    job = jobs.submit("train", *TRAINING, options=TWO_NODES, launcher="srun")
    log = jobs.ends(job)
    summary = jobs.summary(f"hpcavg-train-{job}")
    for run in summary, whole:
        assert (run["num_ranks"], run["num_nodes"]) == (2, 2)
    assert summary["parameters_sha256"] == whole["parameters_sha256"]
    assert log.splitlines()[-1] == "job: done"


def test_a_sweep_trains_once_per_line_and_its_runs_make_one_report(jobs, tmp_path):
    lines = tmp_path / "seeds.txt"
    lines.write_text("--seed 1\n--seed 2\n")
    job = jobs.submit("sweep", *TRAINING, options=[*ONE_NODE, "--array=1-2"], HPCAVG_SWEEP=lines)
    for task in "12":
        jobs.ends(f"{job}_{task}")
    sweep = f"hpcavg-sweep-{job}"
    summaries = [jobs.summary(sweep, task) for task in "12"]
    assert [summary["seed"] for summary in summaries] == [1, 2]
    assert summaries[0]["parameters_sha256"] != summaries[1]["parameters_sha256"]
    folders = [jobs.folder / sweep / task for task in "12"]
    command = [sys.executable, "-m", "hpcavg", "report", *map(str, folders)]
    report = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    assert all(f"{summary['test_accuracy']:.4f}" in report for summary in summaries), report


def test_bad_input_fails_the_job_with_one_line(jobs):
    log = jobs.ends(jobs.submit("train", "--k", "0", options=ONE_NODE), "FAILED", 2)
    errors = [line for line in log.splitlines() if "error" in line and "job:" not in line]
    assert len(errors) == 1, log
    assert errors[0].startswith("hpcavg: error: --k 0"), log
    assert "job: ended with status 2: the input cannot be used" in log


def test_ranks_that_do_not_find_each_other_are_refused_with_the_cure(jobs):
    """All of them end by themselves; the script would have srun kill the second as soon as the first has."""
    flags = "--mpi=pmi2 --kill-on-bad-exit=0"
    alone = jobs.submit("train", *TRAINING, options=ONE_NODE, launcher="srun", HPCAVG_LAUNCHER_FLAGS=flags)
    log = jobs.ends(alone, "FAILED", 2)
    assert log.count("hpcavg: error") == 1, log
    assert "MPI sees 1 alone; start with mpirun or srun --mpi=pmix" in log


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_benchmarks_leave_a_page(jobs, launcher):
    job = jobs.submit("benchmarks", "--only", "step_overhead", options=ONE_NODE, launcher=launcher)
    jobs.ends(job)
    folder = jobs.folder / f"hpcavg-benchmarks-{job}"
    assert json.loads((folder / "step_overhead.json").read_text())
    assert "step_overhead" in (folder / "index.html").read_text()


def test_a_job_whose_disk_is_full_says_so(jobs):
    """It trains on, without records."""
    disk = jobs.slurm.small_disk
    job = jobs.submit("train", *TRAINING, options=ONE_NODE, HPCAVG_RUNS=disk)
    assert jobs.ends(job, "FAILED", 3).splitlines()[-2:] == [
        "job: ended with status 3: done, but records were lost",
        f"job: the disk of {disk}/hpcavg-train-{job} is full: 0 MiB are free",
    ]


def test_a_job_near_its_limit_stops_with_a_checkpoint_and_says_why(jobs, whole, with_limits):
    """Another job goes on from it, as the log says."""
    log = jobs.ends(with_limits["stopped"], "FAILED", 75)
    folder = jobs.folder / f"hpcavg-train-{with_limits['stopped']}"
    last = log.splitlines()[-3:]
    assert last == [
        "job: stopped by SIGUSR1, with a checkpoint",
        f"job: the same options and --output {folder} --resume auto go on from there",
        "job: out of time: the job's limit was near",
    ]
    job = jobs.submit("train", *TRAINING, "--output", folder, "--resume", "auto", options=ONE_NODE)
    jobs.ends(job)
    assert jobs.summary(folder)["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_a_requeued_job_ends_as_if_nothing_had_interrupted_it(jobs, whole, with_limits, launcher):
    """By mpirun on two nodes, by srun on one."""
    job = with_limits[f"requeued {launcher}"]
    log = jobs.ends(job)
    assert int(jobs.slurm.job(job)["Restarts"]) >= 2, log
    assert log.count("job: out of time: the job's limit was near") >= 2, log
    assert log.splitlines()[-1] == "job: done"
    assert jobs.summary(f"hpcavg-requeue-{job}")["parameters_sha256"] == whole["parameters_sha256"]


def test_a_job_that_its_limit_ends_says_so(jobs, with_limits):
    known = jobs.slurm.wait(with_limits["hanging"], TIMEOUT_S)
    log = jobs.slurm.log(with_limits["hanging"])
    assert known["JobState"] == "TIMEOUT"
    assert "DUE TO TIME LIMIT" in log
    assert "out of time" in log.splitlines()[-1], log


def test_a_job_that_somebody_stops_is_not_queued_again(jobs):
    job = jobs.submit("requeue", *TRAINING, options=ONE_NODE, STEP_S=0.6)
    jobs.until(job, "steps;")
    jobs.slurm.run("scancel", "--signal=USR1", "--batch", job)
    log = jobs.ends(job, "FAILED", 75)
    assert "job: SIGUSR1 came long before the limit, so it is not queued again" in log
    assert "out of time" not in log


def test_a_job_that_loses_a_node_says_so(jobs):
    """The last test, for every job on the node is ended."""
    job = jobs.submit("train", *TRAINING, options=[*TWO_NODES, "--no-requeue"], STEP_S=0.6)
    jobs.until(job, "steps;")
    jobs.slurm.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    try:
        known = jobs.slurm.wait(job, TIMEOUT_S)
        log = jobs.slurm.log(job)
    finally:
        jobs.slurm.run("scontrol", "update", "NodeName=node1", "State=RESUME")
    assert known["JobState"] == "NODE_FAIL", log
    assert log.splitlines()[-1] == "job: nodes that are down or do not respond: node1"
