"""Runs that are killed, or told to stop, and resumed: they end with the bits of a run that nothing has disturbed.

With HPCAVG_KILLS=60 the runs are killed 60 times, 15 for each of four algorithms, and a table says where; without it
only two of them are, once each.
"""

import os
import random
from collections import Counter

import pytest

from tests.old_runs import NAMES
from tests.process.launch import run
from tests.process.resuming import differences, outcome, train, train_killed, write_task

pytestmark = pytest.mark.process

KILLS = int(os.environ.get("HPCAVG_KILLS", 2))
STEPS = 150 if KILLS > 2 else 80
SEED = int(os.environ.get("HPCAVG_SEED", 1))
OFTEN = {
    "hier-avg": (3, "--k1 4 --k2 12 --group-size 2 --schedule one-cycle"),
    "dasgd": (2, "--tau 8 --delay 6 --xi 0.25 --schedule step --precision fp16 --partition by-class"),
}
SELDOM = {
    "ada-lupa": (2, "--tau0 2 --rounds 12 --optimizer-state average --schedule one-cycle"),
    "slowmo": (2, "--k 9 --schedule step --warmup-steps 20"),
}
KILLED = OFTEN if KILLS == 2 else OFTEN | SELDOM


def test_all_algorithms_and_options_that_are_stopped_end_with_the_same_bits():
    """Each one is told by a signal in a random step; in the long form up to 15 times."""
    result = run(3, ["--seed", SEED, "--stops", KILLS // len(KILLED)], module="tests.process.stopping", timeout=600)
    assert (result.status, result.err) == (0, ""), result.out
    *lines, last = result.out.splitlines()
    assert last == "end"
    assert len(lines) >= 20
    assert [line for line in lines if not line.startswith("same ")] == []


def test_runs_of_earlier_versions_go_on(tmp_path):
    """As if they had been trained by this one from the start, up to what another build of torch rounds otherwise."""
    result = run(2, [tmp_path], module="tests.process.resuming_old", timeout=300)
    assert (result.status, result.err) == (0, "")
    lines = [line.split() for line in result.out.splitlines()]
    assert [line[:3] for line in lines] == [[name, "True", "True"] for name in NAMES]
    assert all(float(line[3]) < 1e-3 for line in lines)


@pytest.mark.parametrize("algorithm", KILLED)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, algorithm):
    """Killed at random moments, also inside a checkpoint, with means in flight and momentum on its way."""
    ranks, options = KILLED[algorithm]
    task = write_task(tmp_path)
    arguments = ["--algorithm", algorithm, "--task", task, *options.split()]
    arguments += ["--steps", STEPS, "--checkpoint-steps", 7, "--flush-seconds", 0.3, "--batch-size", 8]
    train(ranks, arguments, tmp_path / "undisturbed")
    undisturbed = outcome(tmp_path / "undisturbed")
    assert undisturbed["step/step"].tolist() == [list(range(1, STEPS + 1))] * ranks
    own = random.Random(f"{SEED} {algorithm}")
    num_left, runs, where = KILLS // len(KILLED), 0, Counter()
    while num_left > 0:
        runs += 1
        folder = tmp_path / f"killed-{runs}"
        places = train_killed(ranks, arguments, folder, num_left, own, STEP_S="0.02", CALL_S="0.01")
        where.update(places)
        num_left -= len(places)
        print(f"{algorithm}, run {runs}: killed {', '.join(places) or 'never'}", flush=True)
        assert differences(undisturbed, outcome(folder)) == []
    print(f"{algorithm}: {where.total()} kills in {runs} runs: {dict(where)}", flush=True)
