"""Bad input on 4 ranks: one line, exit status 2, nothing written, nothing hangs."""

import json

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process

RAISING = """
def no_task(config):
    return {}["nothing"]

def one_rank(config):
    from mpi4py import MPI
    if MPI.COMM_WORLD.Get_rank() == 2:
        raise RuntimeError("rank 2 alone")
    from hpcavg.tasks import digits
    return digits.task(config)
"""

LONE = """
import numpy as np
from torch import nn
from hpcavg.tasks import Data, Task

def task(config):  # 17 samples for each of 2 learners
    data = Data(*(array for size in (33, 5) for array in (np.eye(size, 4, dtype="f4"), np.arange(size) % 3)))
    return Task("lone", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), lambda: data)
"""


def refused(folder, arguments, ranks=4, **options):
    """Run hpcavg, check that it ended as bad input must, and return its one line."""
    output = [] if "--output" in arguments else ["--output", folder / "run"]
    result = run(ranks, [*arguments, *output], **options)
    assert result.status == 2, result.err
    assert "Traceback" not in result.err
    assert len(result.own_lines) == 1, result.err
    assert not (folder / "run").exists()
    return result.own_lines[0].removeprefix("hpcavg: error: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "--algorithm fancy",
            "--algorithm fancy: must be one of sgd, sync-sgd, one-shot, k-avg",
        ),
        ("--k1 0", "--k1 0: must be an integer of at least 1"),
        ("--k1 64 --k2 32", "--k1 64: must be an integer of at least 1 and at most k2 = 32"),
        ("--learning-rate -0.1", "--learning-rate -0.1: must be a positive number"),
        ("--weight-decay 1e39", "--weight-decay 1e+39: must be a number of at least 0 and below 1e8"),
        ("--group-size 0", "--group-size 0: must be an integer of at least 1"),
        ("--group-size 5", "--group-size 5: must be an integer of at least 1 and at most 4, the number of learners"),
        (
            "--batch-size 361",
            "--batch-size 361: must be at most 360, a learner's share of 1440 samples over 4 learners",
        ),
        (
            "--task nowhere.py:task",
            "--task nowhere.py:task: must be a file that exists, as path/to/file.py:function",
        ),
        ("--model cnn --model 3", "--model 3: must be one of logistic, mlp, cnn, cnn1d, resnet1d, nin"),
        ("--expect-ranks 8", "--expect-ranks 8: must be the number of ranks that MPI sees, 4"),
    ],
)
def test_one_line_and_status_2(tmp_path, arguments, line):
    assert refused(tmp_path, arguments.split()).startswith(line)


def test_an_unknown_option_in_the_file_lists_the_valid_ones(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("k3 = 4\n")
    line = refused(tmp_path, ["--config", path])
    assert "'k3' is none of algorithm, variant, k, k1, k2," in line


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_task", "KeyError: 'nothing'"),
        ("one_rank", "RuntimeError: rank 2 alone"),
    ],
)
def test_a_task_that_cannot_be_used(tmp_path, function, says):
    path = tmp_path / "mine.py"
    path.write_text(RAISING)
    line = refused(tmp_path, ["--task", f"{path}:{function}"])
    assert line.startswith("--task ")
    assert says in line


def test_a_last_mini_batch_of_one_sample_under_batchnorm(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(LONE)
    line = refused(tmp_path, ["--task", f"{path}:task", "--batch-size", 16], ranks=2)
    assert line.startswith(
        "--batch-size 16: must be another, or given with --drop-last: the last mini-batch of an epoch"
    )
    options = ["--task", f"{path}:task", "--drop-last", "--batch-size", 16, "--epochs", 2, "--output", tmp_path / "run"]
    result = run(2, options)
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(tmp_path, ["--output", tmp_path / "file" / "run"])
    assert line.startswith(f"--output {tmp_path}/file/run: must be a folder that can be written")


def test_an_output_that_holds_another_run(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    line = refused(tmp_path, ["--output", tmp_path / "old"])
    assert line.startswith(f"--output {tmp_path}/old: must be a new or empty folder")
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["summary.json"]


def test_the_help_is_printed_once():
    result = run(4, ["--help"])
    assert result.status == 0
    assert result.out.count("usage:") == 1


def test_the_report_of_no_run(tmp_path):
    result = run(0, ["report", tmp_path / "none"])
    assert result.status == 2
    assert result.err.startswith(f"hpcavg: error: DIR {tmp_path}/none: must be the folder of a run: no folder (No such")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "is_refused"),
    [
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),  # torchrun and its like
    ],
)
def test_lone_ranks_are_noticed(tmp_path, variables, is_refused):
    result = run(0, ["--steps", 1, "--output", tmp_path / "run"], **variables)
    assert result.status == (2 if is_refused else 0), result.err
    if is_refused:
        assert "MPI sees 1 alone" in result.err
        assert "mpirun or srun --mpi=pmix" in result.err
        assert result.err.count("\n") == 1


def test_what_is_left_of_a_launcher_is_told_before_mpi_dies_of_it(tmp_path):
    line = refused(tmp_path, [], ranks=0, PMIX_NAMESPACE="gone@1", PMIX_RANK="0")
    assert line.startswith("PMIX_NAMESPACE=gone@1: must be unset without PMIX_SERVER_URI: no launcher is running")


def test_only_the_first_of_many_lone_ranks_says_so(tmp_path):
    result = run(0, ["--output", tmp_path / "run"], SLURM_NTASKS="4", SLURM_PROCID="3")
    assert (result.status, result.err) == (2, "")


def test_a_lone_rank_may_be_meant(tmp_path):
    result = run(0, ["--steps", 1, "--expect-ranks", 1, "--output", tmp_path / "run"], SLURM_NTASKS="4")
    assert result.status == 0, result.err
