"""One rank makes one call too few, too many or another one: an error on all ranks, or a hang that is named."""

import re

import pytest

from tests.process.launch import run
from tests.process.mismatches import BAD, CHUNK, outcomes

pytestmark = pytest.mark.process

PROGRAM = "tests.process.mismatching"


def test_no_wrong_call_goes_unnoticed():
    """The same on 2, 3 and 4 ranks; `python -m tests.process.mismatches` runs any number."""
    found = {
        seed: (how, text) for first in (0, CHUNK, 2 * CHUNK) for seed, how, text in outcomes(first, 4, timeout_s=1.0)
    }
    assert len(found) == 12
    assert not [each for each in found.values() if each[0] in BAD], found
    # Of these programs most end in an error, and those that leave `finish` out hang.
    assert sum(how == "error" for how, _ in found.values()) > 6
    named = [text for how, text in found.values() if how == "named"]
    assert any(re.search(r"waiting in the averager.finish\(\) after step 12 .*missing: rank", text) for text in named)


def test_a_rank_that_stops_early_is_named_in_the_library_too(tmp_path):
    """Nobody has wired anything; the environment only makes it fast."""
    script = tmp_path / "early.py"
    script.write_text("""
import time, torch
from hpcavg import Averager, Topology, algorithms
topology = Topology()
model = torch.nn.Linear(4, 4)
averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(4), topology)
def stop_early():
    time.sleep(60)
for step in range(1, 9):
    model(torch.randn(8, 4)).square().mean().backward()
    averager.step()
    if topology.rank == 0 and step == 5:
        stop_early()
""")
    result = run(2, [script], module="mpi4py", HPCAVG_HANG_TIMEOUT="1")
    assert result.status == 1
    assert result.wall_s < 30
    assert re.search(r"hung: rank 1 waiting in the global average of step 8 for .* missing: rank 0", result.err)
    assert re.search(r"hung: rank 0 \(process \d+ on \S+\) is alive, in step 6 for", result.err)
    assert "in stop_early" in result.err


def test_a_rank_that_is_slow_but_takes_steps_is_not_hung(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("""
import time, torch
from hpcavg import Averager, Topology, algorithms
topology = Topology()
model = torch.nn.Linear(4, 4)
averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(12), topology)
for step in range(1, 13):
    model(torch.randn(8, 4)).square().mean().backward()
    if topology.rank == 0:
        time.sleep(0.5)
    averager.step()
averager.finish()
""")
    result = run(2, [script], module="mpi4py", HPCAVG_HANG_TIMEOUT="2")
    assert (result.status, result.err) == (0, "")


def test_a_rank_that_is_stopped_while_its_averager_is_made_is_named(tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text("""
import os, signal, torch
from hpcavg import Averager, Topology, algorithms
from hpcavg.averaging import model_parts
topology = Topology()
model = torch.nn.Linear(4, 4)
describe = model_parts.describe
def stop(*arguments):
    if topology.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return describe(*arguments)
model_parts.describe = stop
Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), algorithms.k_avg(12), topology)
""")
    result = run(2, [script], module="mpi4py", HPCAVG_HANG_TIMEOUT="1")
    assert result.status == 1
    assert re.search(r"rank 1 waiting in the set-up of the averager for .*; missing: rank 0\n", result.err)
