"""A rank that is forked looks to its launcher like one that is started."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.process.launch import run, start

pytestmark = pytest.mark.process

PROGRAM = """
import os, signal, sys, time
if sys.argv[1] == "look":
    print(sys.argv[1:], os.getcwd(), os.environ["HERE"], "torch" in sys.modules, "mpi4py" in sys.modules)
elif sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "raise":
    raise ValueError("of a rank")
elif sys.argv[1] == "exit":
    sys.exit(7)
elif sys.argv[1] == "abort":
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()
    if MPI.COMM_WORLD.rank == 1:
        MPI.COMM_WORLD.Abort(5)
    time.sleep(60)
else:
    signal.signal(signal.SIGTERM, lambda number, frame: (os.write(1, b"told\\n"), os._exit(3)))
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path):
    """Return the options of a run of the program."""
    (tmp_path / "program_of_test_warm.py").write_text(PROGRAM)
    return {"module": "program_of_test_warm", "is_warm": True, "PYTHONPATH": str(tmp_path)}


def test_it_has_its_own_arguments_folder_and_variables(program):
    result = run(0, ["look", 1], HERE="here", **program)
    assert (result.status, result.err) == (0, "")
    assert result.out == f"['look', '1'] {os.getcwd()} here True False\n"


@pytest.mark.parametrize(
    ("way", "status", "says"), [("exit", 7, ""), ("kill", -9, ""), ("raise", 1, "ValueError: of a rank\n")]
)
def test_it_ends_with_its_own_status(program, way, status, says):
    result = run(0, [way], **program)
    assert result.status == status
    assert result.err.endswith(says)
    assert bool(result.err) == bool(says)


@pytest.mark.parametrize(("way", "status"), [("kill", 128 + 9), ("abort", 5)])
def test_mpirun_learns_how_it_ended(program, way, status):
    assert run(2, [way], **program).status == status


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_signal_reaches_it(program, name):
    process = start(0, ["wait"], **program)
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(signal.Signals[name])
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == {"SIGTERM": (3, "told\n"), "SIGKILL": (-9, "")}[name]
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
