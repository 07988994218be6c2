"""Two jobs that are given one folder at once; `tests.process.racing` runs any number of such races."""

import dataclasses
import os
import random
import signal
import time

import pytest

from hpcavg.results.run_lock import owners
from tests.process.launch import start
from tests.process.racing import ARGUMENTS, DEADLINE_S, race, wait_for_steps
from tests.process.resuming import kill_all, ranks_of

pytestmark = pytest.mark.process


def test_one_trains_and_the_other_is_refused(tmp_path):
    """Where nothing is yet, and where a run was stopped."""
    for arguments in ([], ["--resume", "auto"]):
        race(tmp_path / "run", random.Random(), arguments)


def test_a_run_that_was_stopped_and_taken_over_ends(tmp_path):
    """All its ranks are stopped for so long that another host has its folder; it writes nothing more there."""
    folder = tmp_path / "run"
    job = start(2, [*ARGUMENTS.split(), "--output", folder])
    try:
        wait_for_steps(folder, job, time.monotonic() + DEADLINE_S)
        ranks = ranks_of(job)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        (owner,) = owners(folder)
        assert owner.pid in ranks
        (folder / "lock-000001").unlink()
        other = dataclasses.replace(owner, run="another", host="node7", pid=17, machine="")
        (folder / "lock-000002").write_bytes(other.to_bytes())
        before = set((folder / "checkpoints").iterdir())
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        err = job.communicate(timeout=DEADLINE_S)[1]
    finally:
        kill_all(job)
    assert job.returncode == 1
    assert f"hpcavg: error: --output {folder}: taken over by process 17 on node7, when this run had not moved" in err
    assert before.issuperset((folder / "checkpoints").iterdir())
    assert [path.name for path in folder.iterdir() if "lock" in path.name] == ["lock-000002"]
