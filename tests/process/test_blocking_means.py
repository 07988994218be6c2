"""The thread that takes blocking means: it ends with the program, and ends the job when it fails."""

import subprocess
import sys

import pytest

from tests.process.launch import FLAGS, environment, mpirun

pytestmark = pytest.mark.process

PROGRAM = """
import sys, torch
from hpcavg import Topology
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine
from hpcavg.algorithms.scope import GLOBAL

topology = Topology()
engine = CudaAwareEngine(topology)
array = torch.full((1, 1000), float(topology.rank))
if topology.rank == 1 and sys.argv[1] == "fail":
    engine._average = None
pending = [engine.start([array], GLOBAL) for _ in range(5)]
if sys.argv[1] == "wait":
    assert all((mean.wait()[0] == 0.5).all() for mean in pending)
if sys.argv[1] == "fail":
    pending[-1].wait()
"""


def run(how):
    command = [mpirun(), "-np", "2", *FLAGS, sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


@pytest.mark.parametrize("how", ["wait", "leave"])
def test_a_program_ends_with_its_means_awaited_or_not(how):
    result = run(how)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_failure_in_the_thread_ends_the_job_and_says_why():
    result = run("fail")
    assert result.returncode != 0
    assert "hpcavg: rank 1 failed; the job is ended" in result.stderr
    assert "TypeError: 'NoneType' object is not callable" in result.stderr
