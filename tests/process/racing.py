"""Two jobs that are given one folder at the same time: one trains, the other is refused and touches nothing.

``python -m tests.process.racing --races 20 --seed 1`` runs any number of such races and says how they ended.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from hpcavg.checkpoints import store
from tests.process.launch import start
from tests.process.resuming import kill_all, ranks_of

REQUEUE = 75
ARGUMENTS = "--model logistic --algorithm k-avg --k 4 --steps 1000000 --checkpoint-steps 100 --flush-seconds 0.1"
DEADLINE_S = 120.0


def race(folder, own, arguments=()):
    """Start two jobs on `folder`, let the other one go on for a while, and stop it; return what the refused one said.

    Raises `AssertionError` unless one is refused, in one line with the process of the other, whose checkpoints are
    whole.
    """
    jobs = []
    try:
        for _ in range(2):
            time.sleep(own.uniform(0, 0.5) if jobs else 0)
            jobs.append(start(2, [*ARGUMENTS.split(), "--output", folder, *arguments]))
        until = time.monotonic() + DEADLINE_S
        while all(job.poll() is None for job in jobs):
            assert time.monotonic() < until, "nobody is refused"
            time.sleep(0.01)
        refused, winner = sorted(jobs, key=lambda job: job.poll() is None)
        out, err = refused.communicate()
        assert refused.returncode == 2, (refused.returncode, out, err)
        said = [line for line in err.replace("\0", "").splitlines() if "hpcavg" in line]
        assert len(said) == 1, err
        assert said[0].startswith(f"hpcavg: error: --output {folder}: must be "), said
        assert out == "", out
        who = re.search(r"process (\d+) on (\S+?)[) ]", said[0])
        assert int(who[1]) in ranks_of(winner), said
        assert who[2] == os.uname().nodename
        wait_for_steps(folder, winner, until)
        winner.send_signal(signal.SIGUSR1)
        out, err = winner.communicate(timeout=DEADLINE_S)
        assert winner.returncode == REQUEUE, (winner.returncode, out, err)
    finally:
        for job in jobs:
            kill_all(job)
    found = [store.open_checkpoint(path) for path in store.candidates(folder / "checkpoints")]
    assert 1 <= len(found) <= 2
    assert [path.name for path in folder.iterdir() if "lock" in path.name] == []
    return said[0]


def wait_for_steps(folder, job, until):
    """Wait until the job has written two checkpoints more, so that it has removed some, too."""
    seen = set()
    while len(seen) < 3:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        with contextlib.suppress(OSError):
            seen.add(os.readlink(folder / "checkpoints" / "latest"))
        time.sleep(0.01)


def main():
    """Run races; end with status 1 where one went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        told = [run_one(Path(place), 1000 * chosen.seed, number) for number in range(chosen.races)]
    wrong = sum("WRONG" in text for text in told)
    print(f"{chosen.races} races, {wrong} wrong")
    sys.exit(wrong > 0)


def run_one(place, seed, number):
    """Run a race where nothing is yet or, every other time, where the one before was stopped; say how it ended."""
    arguments = ["--resume", "auto"] * (number % 2)
    try:
        told = race(place / f"run-{number // 2}", random.Random(seed + number), arguments)
    except AssertionError as error:
        told = f"WRONG: {error}"
    print(f"race {number} {' '.join(arguments)}: {told}", flush=True)
    return told


if __name__ == "__main__":
    main()
