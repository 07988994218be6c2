"""However a cluster ends, nothing of it remains: no process, no namespace, no file in memory or in /tmp."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.process.launch import pid_of_rank, steps_recorded, wait_for

ROOT = Path(__file__).parents[2]


# Ranks that are busy with each other for ever, and a child of one of them that tries to get away.
BUSY = """
import subprocess, sys
from pathlib import Path
from mpi4py import MPI
world = MPI.COMM_WORLD
if world.rank == 3:
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
Path(sys.argv[1], str(world.rank)).touch()
while True:
    world.allreduce(1)
"""


class Watched:
    """A job on a cluster started by the command line, and what exists because of it."""

    def __init__(self, program, is_running):
        self.mark = f"watched-{uuid.uuid4()}"
        self.files = _files()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cluster", "--rate", "1gbit", "--", *program],
            cwd=ROOT,
            env={**os.environ, "WATCHED": self.mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: self.process.poll() is not None or is_running())
        self.namespaces = {space for pid in self.pids() for space in _namespaces(pid)} - _namespaces("self")

    def pids(self):
        """Return the processes that inherited the mark."""
        return [entry.name for entry in Path("/proc").iterdir() if self.mark.encode() in _environ(entry)]

    def remains(self):
        """Return what is still there: processes, namespaces, files."""
        in_use = {space for entry in Path("/proc").iterdir() for space in _namespaces(entry.name)}
        return self.pids(), self.namespaces & in_use, {name for name in _files() - self.files if _is_ours(name)}

    def end(self, timeout_s=30):
        """Wait for the command line; return its status and standard error."""
        _, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, err


def _environ(entry):
    try:
        return (entry / "environ").read_bytes() if entry.name.isdigit() else b""
    except OSError:  # one that has just ended
        return b""


def _namespaces(pid):
    try:
        return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "mnt", "pid", "uts", "ipc")}
    except OSError:
        return set()


def _files():
    return {f"{folder}/{name}" for folder in ("/dev/shm", "/tmp", "/run/netns") for name in _listed(folder)}


def _listed(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def _is_ours(path):
    """Tell files that a cluster might leave from those of programs beside it."""
    return path.startswith("/run/netns/node") or "node0" in path or "node1" in path or "/prted." in path


@pytest.fixture
def watch(two_nodes):
    runs = []

    def start(program, is_running):
        runs.append(Watched(program, is_running))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


@pytest.fixture
def busy(watch, tmp_path):
    return watch(["python", "-c", BUSY, str(tmp_path)], lambda: len(list(tmp_path.iterdir())) == 4)


def check_nothing_remains(watched):
    """The kernel takes a moment: namespaces go after their last process."""
    deadline = time.monotonic() + 5
    while any(watched.remains()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert watched.remains() == ([], set(), set())


def test_the_watch_sees_a_running_cluster(busy):
    pids, namespaces, _ = busy.remains()
    programs = [_program(pid) for pid in pids]
    assert programs.count("sleep") == 1
    assert len(programs) > 4 + 2 + 1 + 1  # ranks, launchers, the child, the command line
    kinds = [space.partition(":")[0] for space in namespaces]
    assert (kinds.count("net"), kinds.count("uts"), kinds.count("pid")) == (1 + 2, 2, 1)  # a switch, two nodes
    busy.process.terminate()
    busy.end()


def test_after_an_orderly_end(two_nodes):
    before = _files()
    result = two_nodes.run(["python", "-c", "from mpi4py import MPI; MPI.COMM_WORLD.Barrier()"], timeout_s=60)
    assert result.returncode == 0, result.stderr
    assert {name for name in _files() - before if _is_ours(name)} == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_after_a_signal(busy, number):
    busy.process.send_signal(number)
    status, _ = busy.end()
    assert status == 128 + number
    check_nothing_remains(busy)


def test_after_the_command_line_was_killed(busy):
    busy.process.kill()
    busy.process.wait(timeout=5)
    check_nothing_remains(busy)


@pytest.mark.parametrize("program", ["prterun", "prted", "unshare"])
def test_after_a_launcher_was_killed(busy, program):
    os.kill(next(int(pid) for pid in busy.pids() if program in _program(pid)), signal.SIGKILL)
    status, _ = busy.end()
    assert status != 0
    check_nothing_remains(busy)


@pytest.mark.parametrize("rank", [0, 3])
def test_after_a_rank_of_a_training_was_killed(watch, tmp_path, rank):
    """Rank 3 is on the other node."""
    folder = tmp_path / "run"
    program = ["python", "-m", "hpcavg", "--epochs", "10000", "--flush-seconds", "0", "--output", str(folder)]
    training = watch(program, lambda: sum(steps_recorded(folder)) > 0)
    os.kill(pid_of_rank(folder, rank), signal.SIGKILL)
    status, _ = training.end()
    assert status not in (0, 2)
    check_nothing_remains(training)


def test_one_cluster_ends_and_another_goes_on(busy, two_nodes):
    # Not uname: mpirun may wait for ever for programs without MPI that end at once on two nodes.
    program = "from mpi4py import MPI; print(MPI.Get_processor_name())"
    result = two_nodes.run(["python", "-c", program], timeout_s=60)
    assert sorted(result.stdout.split()) == ["node0", "node0", "node1", "node1"]
    assert busy.process.poll() is None
    assert len(busy.namespaces & busy.remains()[1]) == len(busy.namespaces)


def _program(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].rpartition("/")[2]
