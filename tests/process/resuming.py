"""Runs that are killed or stopped and resumed, and how they compare to one that nothing has disturbed."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from hpcavg.results.columns import COLUMNS
from hpcavg.results.view import read_view
from tests.process.launch import run, start

# A model with BatchNorm, dropout and noise of all generators that a checkpoint knows, slow enough to be met in a step.
TASK = """
import os, random, time
import numpy as np, torch
from torch import nn
from hpcavg.utils import files
from hpcavg.tasks import Task, synthetic

STEP_S, CALL_S = float(os.environ.get("STEP_S", 0)), float(os.environ.get("CALL_S", 0))
BEGUN = os.environ.get("BEGUN")  # a folder, for the number of steps that each rank has begun
steps = 0
make_the_call = files.perform

def perform(call, *arguments):
    time.sleep(CALL_S)
    return make_the_call(call, *arguments)

files.perform = perform

def count_step():
    global steps
    steps += 1
    if BEGUN:
        with open(os.path.join(BEGUN, os.environ["OMPI_COMM_WORLD_RANK"]), "a") as file:
            file.write(f"{steps}\\n")

def noisy_loss(output, target):
    if torch.is_grad_enabled():
        count_step()
        time.sleep(STEP_S)
        output = output * (1 + 0.05 * random.random()) + 0.05 * np.random.rand() + 0.05 * torch.rand_like(output)
    return nn.functional.cross_entropy(output, target)

def build():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 10)
    )

def task(config):
    return Task("noisy", build_model=build, load_data=lambda: synthetic.load_data((64,), 10, 420, 0), loss=noisy_loss)
"""
# Seconds and what follows from them are all that may differ from an undisturbed run.
_CLOCKS = {"compute_s", "data_s", "averaging_s", "started_s", "blocked_s", "in_flight_s"}
_SUMMARY_CLOCKS = {"wall_s", "compute_s", "data_s", "averaging_blocked_s", "hidden_fraction", "startup_s"}
_SUMMARY_CLOCKS |= {"evaluation_s", "checkpoint_s"}


def write_task(folder):
    """Return the value of --task."""
    (folder / "noisy.py").write_text(TASK)
    return f"{folder / 'noisy.py'}:task"


def train(ranks, arguments, folder, status=0, timeout=120, **changes):
    """Run to the end, with --resume auto; return the result."""
    result = run(ranks, [*arguments, "--resume", "auto", "--output", folder], timeout=timeout, **changes)
    assert result.status == status, f"status {result.status}\n{result.out}\n{result.err}"
    return result


def outcome(folder):
    """Return all that a run leaves which must not depend on how often it was killed."""
    summary = json.loads((folder / "summary.json").read_text())
    left = {name: value for name, value in summary.items() if name not in _SUMMARY_CLOCKS}
    for group, columns in COLUMNS.items():
        view = read_view(folder / "metrics", group)
        left |= {f"{group}/{name}": view[name] for name in columns if name not in _CLOCKS}
    return left


def differences(left, right):
    """Return the names of what differs between two outcomes in a single bit."""

    def bits(value):
        return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value

    return [name for name in left.keys() | right.keys() if bits(left.get(name)) != bits(right.get(name))]


def ranks_of(process):
    """Return the process ids of the ranks that a launcher has started so far."""
    pids, threads = [], Path(f"/proc/{process.pid}/task")
    with suppress(OSError):  # the launcher has ended
        for thread in os.listdir(threads):
            with suppress(OSError):  # the thread has ended
                pids += map(int, (threads / thread / "children").read_text().split())
    return pids


def kill_all(process):
    """Kill the launcher and all ranks at once, if they are still there, and wait until they are gone."""
    if process.poll() is not None:
        process.communicate()
        return
    os.kill(process.pid, signal.SIGSTOP)  # so that it starts no more of them
    pids = ranks_of(process)
    for pid in (process.pid, *pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def whole(folder):
    """Return the names of the checkpoints that count."""
    return {path.parent.name for path in (folder / "checkpoints").glob("step-*/manifest.json")}


def unfinished(folder):
    """Return the names of the checkpoints that do not."""
    return {path.name for path in (folder / "checkpoints").glob("step-*")} - whole(folder)


def kill_somewhere(process, folder, own: random.Random):
    """Kill the run at a random moment; return where that was, None where it ended before."""
    before = time.monotonic()
    segments = len(list(folder.glob("metrics/rank-00000*.h5")))

    def wait_for(condition):
        while process.poll() is None and not condition():
            assert time.monotonic() < before + 300
            time.sleep(0.002)

    def is_training():
        return len(list(folder.glob("metrics/rank-00000*.h5"))) > segments

    moment = own.choices(["start", "any", "checkpoint"], [1, 5, 4])[0]
    if moment == "start":
        wait_for(lambda: time.monotonic() > before + own.uniform(0, 6))
    else:
        wait_for(is_training)
        started = time.monotonic()
        delay_s = own.uniform(0, 5)
        wait_for(lambda: time.monotonic() > started + delay_s)
        if moment == "checkpoint":
            left = unfinished(folder)
            wait_for(lambda: unfinished(folder) - left)
            inside = time.monotonic()
            delay_s = own.uniform(0, 0.4)
            wait_for(lambda: time.monotonic() > inside + delay_s)
    if process.poll() is not None:
        process.communicate()
        return None
    was_training, left = is_training(), unfinished(folder)
    kill_all(process)
    if not was_training:
        return "starting up"
    partial = list((folder / "checkpoints").glob("*/*.partial")) + list((folder / "checkpoints").glob("*.partial"))
    if partial:
        return "in a manifest or link"
    return "in a checkpoint's files" if unfinished(folder) & left else "between checkpoints"


def train_killed(ranks, arguments, folder, num_kills, own, **changes):
    """Run with --resume auto until it ends, killing it up to `num_kills` times; return where it was killed."""
    where = []
    while len(where) < num_kills:
        process = start(ranks, [*arguments, "--resume", "auto", "--output", folder], **changes)
        place = kill_somewhere(process, folder, own)
        if place is None:
            assert process.returncode == 0, process.returncode
            return where
        where.append(place)
    train(ranks, arguments, folder, timeout=300, **changes)
    return where
