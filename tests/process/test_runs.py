"""Whole runs: the record they leave, that they repeat, and how they end when a rank fails."""

import hashlib
import json
import os
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import torch

from hpcavg.checkpoints.store import load_model
from hpcavg.results.columns import COLUMNS
from hpcavg.results.view import read_view
from tests.process.launch import pid_of_rank, run, start, steps_recorded, trained, wait_for

pytestmark = pytest.mark.process

SUMMARY = """
    algorithm task num_learners num_ranks num_nodes group_size steps epochs samples train_loss test_loss test_accuracy
    global_averages local_averages bytes_averaged wall_s compute_s data_s averaging_blocked_s hidden_fraction startup_s
    seed completed
"""


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    summary, result = trained(folder, 4, ["--group-size", 2, "--epochs", 5])
    return folder, summary, result


def test_the_summary_says_what_happened(default_run):
    _, summary, _ = default_run
    assert not set(SUMMARY.split()) - set(summary)
    steps = 5 * 23  # 1440 samples over 4 learners: 22 batches of 16 and one of 8
    assert (summary["steps"], summary["epochs"], summary["samples"]) == (steps, 5, 5 * 1440)
    assert (summary["global_averages"], summary["local_averages"]) == (
        3 + 1,
        3 * 7 + 4,
    )  # K2 = 32, K1 = 4, the final mean
    assert (summary["num_ranks"], summary["group_size"], summary["num_nodes"]) == (4, 2, 1)
    assert summary["test_accuracy"] > 0.9
    assert summary["completed"] is True
    assert 0 < summary["startup_s"] < 60


def test_the_metrics_hold_every_step_of_every_rank(default_run):
    folder, summary, _ = default_run
    view = read_view(folder / "metrics", "step")
    assert (view["step"] == np.arange(1, summary["steps"] + 1)).all()
    assert view["loss"].shape == (4, summary["steps"])
    assert np.isfinite(view["loss"]).all()
    averaging = read_view(folder / "metrics", "averaging")
    assert (averaging["scope"] == b"global").sum(axis=1).tolist() == [summary["global_averages"]] * 4
    assert averaging["bytes"].sum(axis=1).tolist() == [summary["bytes_averaged"]] * 4
    evaluation = read_view(folder / "metrics", "evaluation")
    assert evaluation["epoch"][0].tolist() == [1, 2, 3, 4, 5]
    assert evaluation["test_accuracy"][0, -1] == summary["test_accuracy"]
    with h5py.File(folder / "metrics" / "rank-00003.h5", "r") as file:
        assert (file.attrs["rank"], file.attrs["group"], file.attrs["algorithm"]) == (3, 1, "hier_avg")
        assert (len(file.attrs["label_counts"]), sum(file.attrs["label_counts"])) == (10, 1440 // 4)
        assert all("units" in file[group][name].attrs for group in COLUMNS for name in COLUMNS[group])


def test_the_environment_is_recorded(default_run):
    folder, _, _ = default_run
    environment = json.loads((folder / "environment.json").read_text())
    assert "Open MPI" in environment["mpi_library"]
    assert environment["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(environment["nodes"]) == 1


def test_a_batch_log_has_one_line_per_epoch_and_a_table(default_run):
    folder, summary, result = default_run
    lines = result.out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 5
    assert "\x1b" not in result.out
    assert f"{summary['test_accuracy']:.4f}" in result.out
    assert any(str(folder) in line for line in lines)


def test_the_same_command_gives_the_same_bits(default_run, tmp_path):
    folder, summary, _ = default_run
    again, _ = trained(tmp_path / "again", 4, ["--config", folder / "config.toml"])
    assert again["parameters_sha256"] == summary["parameters_sha256"]


def test_the_model_file_holds_the_model(default_run):
    from hpcavg.models import build

    folder, summary, _ = default_run
    path = folder / "checkpoints" / "final.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == summary["parameters_sha256"]
    state = load_model(path)
    model = build("cnn", (1, 8, 8), 10)
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"])


def test_the_report_prints_a_table_and_draws_the_curves(default_run, tmp_path):
    folder, summary, _ = default_run
    result = run(0, ["report", folder, folder, "--output", tmp_path / "curves.png"])
    assert result.status == 0, result.err
    assert result.out.count(f"{summary['test_accuracy']:.4f}") >= 2
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_drawn_or_is_not_whole(default_run, tmp_path):
    folder, _, _ = default_run
    result = run(0, ["report", folder, "--output", tmp_path / "curves.odd"])
    assert result.status == 2
    assert "Traceback" not in result.err
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    (partial / "metrics" / "rank-00001.h5").unlink()
    result = run(0, ["report", partial])
    assert result.status == 0
    assert "partial: no metrics of 1 rank, first of rank 1" in result.out


def test_sync_sgd_on_4_ranks_is_one_rank_with_4_times_the_batch(tmp_path):
    arguments = ["--algorithm", "sync-sgd", "--model", "mlp", "--dtype", "float64", "--epochs", 2, "--momentum", 0.9]
    many, _ = trained(tmp_path / "many", 4, [*arguments, "--batch-size", 8])
    one, _ = trained(tmp_path / "one", 1, [*arguments, "--batch-size", 32])
    assert many["steps"] == one["steps"] == 90
    states = [load_model(tmp_path / name / "checkpoints" / "final.safetensors") for name in ("many", "one")]
    for name in states[0]:
        difference = (states[0][name] - states[1][name]).norm() / states[1][name].norm()
        assert difference <= 1e-12, name


def test_synthetic_images_train_on_3_uneven_ranks(tmp_path):
    shape = ["--image-shape", "2x6x5", "--num-classes", 3, "--num-samples", 400]
    arguments = ["--task", "synthetic", *shape, "--partition", "shared", "--group-size", 2, "--steps", 40]
    summary, _ = trained(tmp_path / "run", 3, arguments)
    assert summary["steps"] == 40
    assert np.isfinite(summary["test_loss"])
    assert summary["train_loss"] < 2.4


FAILING = """
import torch
from hpcavg.tasks import digits
from hpcavg.tasks.task import Task
import dataclasses
from mpi4py import MPI

STEPS = 0

def task(config):
    def loss(output, target):
        global STEPS
        STEPS += torch.is_grad_enabled()
        if STEPS == 35 and MPI.COMM_WORLD.Get_rank() == 1:
            FAIL
        return torch.nn.functional.cross_entropy(output, target)
    return dataclasses.replace(digits.task(config), loss=loss)
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise RuntimeError('rank 1 breaks')", "RuntimeError: rank 1 breaks"),
        ("import sys; sys.exit(0)", "sys.exit(0) was called during training"),
    ],
    ids=["raises", "exits"],
)
def test_a_rank_that_fails_ends_the_job_and_the_records_survive(tmp_path, how, says):
    (tmp_path / "mine.py").write_text(FAILING.replace("FAIL", how))
    folder = tmp_path / "run"
    started = time.monotonic()
    arguments = ["--task", f"{tmp_path}/mine.py:task", "--flush-seconds", 0, "--output", folder]
    result = run(2, arguments, is_warm=False)
    assert result.status not in (0, 2)
    assert time.monotonic() - started < 30
    assert "hpcavg: rank 1 failed" in result.err
    assert says in result.err
    assert result.err.count("hpcavg: rank") == 1
    assert not (folder / "summary.json").exists()
    view = read_view(folder / "metrics", "step")
    assert (view["step"] > 0).sum(axis=1).min() >= 32
    assert (view["step"][:, :32] == np.arange(1, 33)).all()
    for rank in range(2):
        with h5py.File(folder / "metrics" / f"rank-{rank:05d}.h5", "r", swmr=True) as file:
            assert len(file["step/loss"]) >= 32


def test_a_killed_rank_ends_the_job_and_leaves_nothing_behind(tmp_path):
    folder, there = tmp_path / "run", shared_files()
    process = start(4, ["--epochs", 10_000, "--flush-seconds", 0, "--output", folder])
    try:
        wait_for(lambda: sum(steps_recorded(folder)) > 100)
        os.kill(pid_of_rank(folder, 2), signal.SIGKILL)
        killed = time.monotonic()
        process.communicate(timeout=20)
        assert time.monotonic() - killed < 10
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode != 0
    wait_for(lambda: not shared_files() - there, seconds=20)  # those of other jobs come and go
    assert (read_view(folder / "metrics", "step")["step"] > 0).sum() > 100


def shared_files():
    """Return the files of hpcavg in shared memory, also those of others."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("hpcavg")}


def test_the_compiler_is_there_for_those_who_ask():
    import subprocess
    import sys

    program = """
import sys, torch
from hpcavg.training.eager import defer_compiler_import
defer_compiler_import()
x = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([x], lr=0.1, momentum=0.9)
x.sum().backward(); optimizer.step(); optimizer.zero_grad()
assert "sympy" not in sys.modules
import inspect
inspect.getmodule(sys._getframe(), "nobody's file")  # looks through all modules, as torch does while it is imported
assert "sympy" not in sys.modules
import torch._dynamo.config
assert "sympy" in sys.modules
double = torch.compile(lambda y: 2 * y, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2]
x.sum().backward(); optimizer.step()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
