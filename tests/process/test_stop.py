"""Runs that are told to stop: by signals to the launcher or to a rank, by the clock, at any time of their lives."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from hpcavg.results.view import read_view
from tests.process.launch import pid_of_rank, run, start, steps_recorded, wait_for
from tests.process.resuming import differences, kill_all, outcome, ranks_of, train, write_task

pytestmark = pytest.mark.process

REQUEUE = 75
RANKS = 3
HIER_AVG = "--k1 4 --k2 32 --group-size 2 --batch-size 8 --flush-seconds 0.1 --steps"


def catches_usr1(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught & 1 << signal.SIGUSR1 - 1)


def ended(process, seconds=200):
    """Return what the process has shown when it has ended."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err
    return out


@pytest.fixture
def program(tmp_path):
    """Return a function that starts the run."""
    task, processes = write_task(tmp_path), []

    def begin(*arguments, folder=tmp_path / "run", is_warm=True, **changes):
        options = ["--task", task, *HIER_AVG.split(), *map(str, arguments), "--resume", "auto", "--output", folder]
        processes.append(start(RANKS, options, is_warm=is_warm, **changes))
        return processes[-1]

    yield begin
    for process in processes:
        kill_all(process)


@pytest.mark.parametrize(
    "way", ["SIGUSR1 to the launcher", "SIGTERM to all ranks", "SIGTERM to one rank", "SIGUSR1 twice"]
)
def test_a_signal_is_heeded_within_a_step(program, tmp_path, way):
    """Means are far apart, and ranks at different steps of the same round."""
    step_s, begun = 0.5, tmp_path / "begun"
    begun.mkdir()

    def steps_begun():
        return [len(path.read_text().splitlines()) for path in begun.iterdir()] or [0]

    process = program(1000, STEP_S=str(step_s), BEGUN=str(begun))
    wait_for(lambda: max(steps_begun()) > 4, process, 200)
    time.sleep(random.uniform(0, step_s))
    sent_s = time.monotonic()
    if "SIGTERM" in way:
        for pid in ranks_of(process)[0 if "all" in way else -1 :]:
            os.kill(pid, signal.SIGTERM)
    else:
        for _ in range(2 if way == "SIGUSR1 twice" else 1):
            process.send_signal(signal.SIGUSR1)
    taking = max(steps_begun())
    out = ended(process)
    took_s = time.monotonic() - sent_s
    step = int(os.readlink(tmp_path / "run" / "checkpoints" / "latest").removeprefix("step-"))
    print(f"{way}: in step {taking}; {took_s:.2f} s later ended, with a checkpoint of step {step}")
    assert process.returncode == REQUEUE
    assert f"stopped at step {step} by {way.split()[0]}; go on with --resume " in out
    assert steps_recorded(tmp_path / "run").tolist() == [step] * RANKS
    # Threads that have heard no signal themselves look for messages twice a second: that of rank 0, then the others.
    lag_steps = round(2 * 0.5 / step_s) if "one" in way else 0
    assert step <= taking + 1 + lag_steps
    assert took_s < (2 + lag_steps) * step_s + 10  # the write, and the end of all processes on a busy machine


def test_a_run_that_is_stopped_in_every_way_ends_with_the_same_bits(program, tmp_path):
    folder, steps = tmp_path / "run", 120
    undisturbed = program(steps, folder=tmp_path / "undisturbed")
    ended(undisturbed)

    def is_stopped(process, says):
        out = ended(process)
        assert (process.returncode, says in out) == (REQUEUE, True), out
        return max(steps_recorded(folder))

    # While starting: it stops after its first step, or the next ones, for which all ranks are still to be woken.
    process = program(steps, is_warm=False, STEP_S="0.1")
    wait_for(lambda: len(ranks_of(process)) == RANKS and all(map(catches_usr1, ranks_of(process))), process, 200)
    process.send_signal(signal.SIGUSR1)
    first = is_stopped(process, "by SIGUSR1")
    assert 1 <= first <= 3
    process = program(steps, "--stop-after", 0.001, STEP_S="0.1")
    second = is_stopped(process, "by --stop-after 0.001")
    assert first < second <= first + 3
    ends_s = str(int(time.time()) + 3600)
    process = program(steps, "--stop-margin", 3600, STEP_S="0.1", SLURM_JOB_END_TIME=ends_s)
    assert second < is_stopped(process, "by the Slurm job ends in 3600 s") <= second + 3
    # About to finish: it may just do so.
    process = program(steps, STEP_S="0.03")
    wait_for(lambda: max(steps_recorded(folder)) > steps - 10, process, 200)
    process.send_signal(signal.SIGUSR1)
    ended(process)
    assert process.returncode in (0, REQUEUE)
    train(RANKS, ["--task", tmp_path / "noisy.py:task", *HIER_AVG.split(), steps], folder)
    assert differences(outcome(tmp_path / "undisturbed"), outcome(folder)) == []


@pytest.mark.parametrize(("name", "rank"), [("SIGUSR1", None), ("SIGTERM", RANKS - 1)], ids=["all", "server"])
def test_an_asynchronous_run_ends_early_with_its_model(tmp_path, name, rank):
    arguments = ["--algorithm", "downpour", "--steps", 10**6, "--flush-seconds", 0.1, "--output", tmp_path / "run"]
    process = start(RANKS, arguments, is_warm=True)
    try:
        wait_for(lambda: max(steps_recorded(tmp_path / "run")) > 20, process, 200)
        os.kill(process.pid if rank is None else pid_of_rank(tmp_path / "run", rank), signal.Signals[name])
        out = ended(process)
    finally:
        kill_all(process)
    assert process.returncode == 1
    assert f"by {name}; there is no checkpoint to go on from" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["completed"] is False
    assert 20 < summary["steps"] < 10**6
    assert (tmp_path / "run" / "checkpoints" / "final.safetensors").exists()
    assert run(0, ["report", tmp_path / "run"]).status == 0


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on_from_the_mean(tmp_path, before, after):
    """Also when it is stopped again: with more ranks, its checkpoints are of fewer steps than the one it began with."""
    folder = tmp_path / "run"
    arguments = ["--model", "mlp", "--algorithm", "slowmo", "--resume", "auto", "--output", folder, "--epochs"]
    first = run(before, [*arguments, 3], timeout=200)
    assert first.status == 0, first.err
    stopped = run(after, [*arguments, 6, "--stop-after", 0.001], timeout=200)
    assert stopped.status == REQUEUE, stopped.err
    per_epoch = {2: 45, 3: 30}[after]
    assert f"going on from step {3 * per_epoch}: " in stopped.out
    assert f"warning: it is of {before} learners; {after} start from their mean" in stopped.out
    step = int(os.readlink(folder / "checkpoints" / "latest").removeprefix("step-").partition("~")[0])
    assert 3 * per_epoch < step < 4 * per_epoch
    last = run(after, [*arguments, 6], timeout=200)
    assert last.status == 0, last.err
    assert f"going on from step {step}: " in last.out
    assert "warning: it is of" not in last.out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["num_learners"]) == (6 * per_epoch, after)
    assert summary["test_accuracy"] > 0.9
    evaluations = read_view(folder / "metrics", "evaluation")
    assert evaluations["epoch"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert (evaluations["train_loss"][0] < 3).all()
    assert run(0, ["report", folder]).status == 0
