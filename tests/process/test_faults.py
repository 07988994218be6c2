"""Faults on one node, as a user meets them: what is said, by whom, and the exit status."""

import json
import re

import pytest

from hpcavg.checkpoints import store
from tests.process.launch import ULFM, run

pytestmark = pytest.mark.process

TASK = ["--task", "tests/process/faulty.py:task", "--model", "mlp"]
DEADLINE_S = 300  # of runs that take some seconds, where others have the cores
# From the timeout until the report: answers are awaited, and the thread that asks is not always on time.
REPORT_S = 5


def train(folder, fault, ranks, *arguments):
    flags = ULFM if "shrink" in arguments else ()
    is_warm = not fault.startswith("raise")  # which ends Python
    command = [*TASK, "--output", folder, *arguments]
    return run(ranks, command, timeout=DEADLINE_S, flags=flags, is_warm=is_warm, FAULT=fault)


def said(result, start):
    """Return the only line in which ranks say something that starts so."""
    text = result.out + result.err
    lines = [line[line.index(start) :] for line in text.splitlines() if start in line]
    assert len(lines) == 1, text
    return lines[0]


def assert_no_traceback(result):
    assert "Traceback" not in result.err
    assert "HDF5" not in result.err


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


# -- ranks that hang ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "policy", "status"), [("stop", "abort", 1), ("sleep", "restart", 75), ("stop", "shrink", 0)]
)
def test_a_rank_that_hangs_is_named_in_time(tmp_path, fault, policy, status):
    folder = tmp_path / "run"
    arguments = ("--epochs", 2, "--hang-timeout", 3, "--on-failure", policy)
    result = train(folder, f"{fault}:1:30", 3, *arguments)
    assert result.status == status, result.err
    line = said(result, "waiting in the ")
    found = re.fullmatch(r"waiting in the evaluation after step 30 for (.*) s; missing: rank 1", line)
    assert found, result.err
    assert 3 <= float(found[1]) < 3 + REPORT_S
    if fault == "sleep":
        assert re.search(r"hung: rank 1 \(process \d+ on \S+\) is alive, in step \d+ for", result.err)
        assert re.search(r'faulty.py", line \d+ in sleep_too_long', result.err)
    else:
        assert re.search(r"hung: rank 1 \(process \d+ on \S+\) does not answer: stopped", result.err)
    assert_no_traceback(result)
    if policy == "shrink":
        assert "lost rank 1; 2 learners went on" in said(result, "warning: step ")
        assert summary(folder)["completed"]


# -- ranks that die -----------------------------------------------------------------------------------------------


def test_a_rank_that_raises_leaves_alone_under_shrink(tmp_path):
    result = train(tmp_path / "run", "raise:1:30", 3, "--epochs", 2, "--on-failure", "shrink")
    assert result.status == 0, result.err
    assert said(result, "hpcavg: rank 1 failed") == "hpcavg: rank 1 failed; the others go on without it"
    assert said(result, "RuntimeError: ") == "RuntimeError: rank 1 breaks"
    assert "lost rank 1; 2 learners went on" in said(result, "warning: step ")
    assert summary(tmp_path / "run")["num_learners"] == 2


@pytest.mark.parametrize(("fault", "status"), [("raise", 75), ("kill", 128 + 9)])
def test_a_rank_that_dies_under_restart(tmp_path, fault, status):
    """Whose processes are killed from outside gets the launcher's status, which hpcavg has no part in."""
    result = train(tmp_path / "run", f"{fault}:1:30", 3, "--epochs", 2, "--on-failure", "restart")
    assert result.status == status, result.err
    assert ("RuntimeError: rank 1 breaks" in result.err) == (fault == "raise")


# -- learners that are sick ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "step"), [("hier-avg", 57), ("dasgd", 101)])
def test_a_sick_learner_costs_no_accuracy(tmp_path, algorithm, step):
    accuracies = {}
    # Learner 2 is alone in its group, so that hier-avg can help it at the global average only.
    for fault in ("none:0:0", f"nan:2:{step}"):
        folder = tmp_path / fault.partition(":")[0]
        arguments = ("--epochs", 10, "--algorithm", algorithm, "--group-size", 2)
        result = train(folder, fault, 3, *arguments)
        assert result.status == 0, result.err
        accuracies[fault] = summary(folder)["test_accuracy"]
    line = said(result, "warning: step ")
    found = re.match(
        r"warning: step (\d+): parameters of learner 2 are not finite; it was left out of the global", line
    )
    assert found, line
    assert step <= int(found[1]) <= step + 32
    assert max(accuracies.values()) - min(accuracies.values()) <= 0.01, accuracies


def test_long_evaluations_are_no_hang(tmp_path):
    result = train(tmp_path / "run", "slow:all:0", 3, "--epochs", 1, "--hang-timeout", 3)
    assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize(
    ("who", "arguments", "says"),
    [
        ("1", ["--non-finite", "stop"], "learner 1 (1 of 3) with parameters that are not finite"),
        ("all", ["--algorithm", "dasgd"], "learners 0, 1, 2 (3 of 3) with parameters that are not finite"),
        # The next mean comes after the checkpoint of step 40, which must not become the last one.
        ("all", ["--algorithm", "one-shot"], "learners 0, 1, 2 (3 of 3) with parameters that are not finite"),
    ],
    ids=["stop", "all", "checkpoint"],
)
def test_sick_learners_stop_the_run(tmp_path, who, arguments, says):
    folder = tmp_path / "run"
    result = train(folder, f"nan:{who}:30", 3, "--epochs", 2, "--checkpoint-steps", 20, *arguments)
    assert result.status == 1
    line = said(result, "hpcavg: error: ")
    assert says in line
    assert line.endswith(f"; last good checkpoint: {folder / 'checkpoints' / 'step-00000020'}")
    assert [path.name for path in store.candidates(folder / "checkpoints")] == ["step-00000020"]
    assert_no_traceback(result)


# -- bits that flip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "ranks", "status"), [("abort", 3, 1), ("restart", 3, 75), ("shrink", 4, 0)])
def test_a_flipped_bit_is_found_at_the_next_check(tmp_path, policy, ranks, status):
    arguments = ("--epochs", 2, "--algorithm", "k-avg", "--check-rounds", 1, "--on-failure", policy)
    result = train(tmp_path / "run", "flip:2:30", ranks, *arguments)
    assert result.status == status, result.err
    line = said(result, "hpcavg: error: ")
    assert line.startswith("hpcavg: error: learner 2 with other parameters at step 32; ")
    assert_no_traceback(result)
    if policy == "shrink":
        assert line.endswith("this rank leaves")
        assert "lost rank 2; 3 learners went on" in said(result, "warning: step ")


# -- records that cannot be written -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["vanish:0:30", "full:all:30"], ids=["vanished folder", "full disk"])
def test_a_run_whose_records_are_lost_trains_on(tmp_path, fault):
    folder = tmp_path / "run"
    result = train(folder, fault, 2, "--epochs", 2, "--checkpoint-steps", 20, "--flush-seconds", 0.1)
    assert result.status == 3, result.err
    assert result.out.count("\nepoch ") == 2
    kinds = ["/rank-0000", "checkpoint of step ", "/final.safetensors"]
    told = [line for line in result.out.splitlines() if line.startswith("warning: not recorded: ")]
    for kind in kinds:
        assert sum(kind in line for line in told) == 1, result.out
    at_the_end = said(result, "warning: the run is complete; its record is not: ")
    assert all(kind in at_the_end for kind in kinds)
    assert_no_traceback(result)
    if fault.startswith("full"):  # what was there before is unharmed
        saved, passed_over = store.newest(folder / "checkpoints")
        assert (saved.manifest.step, passed_over) == (20, [])


def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path):
    folder = tmp_path / "run"
    result = train(folder, "no-space:0:0", 2, "--epochs", 1)
    assert result.status == 2
    assert said(result, "hpcavg: error: ").startswith(f"hpcavg: error: --output {folder}: must be a folder that can be")
    assert_no_traceback(result)
    assert not folder.exists()
