"""jobs/restart.sh starts again what has failed, hands on what somebody wants, and ends with the undisturbed model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.process.launch import FLAGS, environment, mpirun, pid_of_rank, run, wait_for

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "restart.sh"
# Acts by the words of the file `plan`, one for every time that it is started: a status to end with; "done", with a
# summary; "step", a newer checkpoint before status 75; "wait", until SIGUSR1 comes, for status 75.
FAKE = """
import os, signal, sys, time
from pathlib import Path
here = Path(sys.argv[1])
word, *rest = (here / "plan").read_text().split()
(here / "plan").write_text(" ".join(rest))
(here / "checkpoints").mkdir(exist_ok=True)
latest = here / "checkpoints" / "latest"
if word == "done":
    (here / "new").write_text("{}")
    (here / "new").rename(here / "summary.json")
elif word == "step":
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"step-{len(rest)}")
    (here / "checkpoints" / f"step-{len(rest)}").mkdir()
    sys.exit(75)
elif word == "wait":
    def stop(number, frame):
        (here / "told").write_text(signal.Signals(number).name)
        os._exit(75)
    signal.signal(signal.SIGUSR1, stop)
    (here / "waits").touch()
    time.sleep(60)
elif word in ("KILL", "ABRT"):
    os.kill(os.getpid(), getattr(signal, "SIG" + word))
else:
    sys.exit(int(word))
"""


def command(folder, *options, more=()):
    fake = [sys.executable, "-c", FAKE, str(folder), "--resume", "auto", "--output", str(folder), *more]
    return [str(SCRIPT), *options, "--", *fake]


def restart(folder, plan, *options, more=(), **variables):
    """Return the status, the last line, and the words of the plan that are left."""
    (folder / "plan").write_text(plan)
    result = subprocess.run(
        command(folder, *options, more=more),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    return result.returncode, result.stderr.splitlines()[-1], (folder / "plan").read_text()


@pytest.mark.parametrize("word", ["75", "KILL", "ABRT", "137", "0"])
def test_what_did_not_end_is_started_again(tmp_path, word):
    """Status 0 without a summary is what mpirun ends with when it has lost a node."""
    assert restart(tmp_path, f"{word} {word} done 9") == (0, "restart.sh: done, after 2 restarts", "9")


@pytest.mark.parametrize("status", [1, 2, 3, 130, 143])
def test_what_failed_or_is_complete_is_not(tmp_path, status):
    line = f"restart.sh: ended with status {status}, after 0 restarts"
    assert restart(tmp_path, f"{status} done") == (status, line, "done")


def test_a_summary_of_before_is_no_sign(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    assert restart(tmp_path, "0 done 9") == (0, "restart.sh: done, after 1 restarts", "9")


def test_it_gives_up_where_there_is_no_progress(tmp_path):
    line = "restart.sh: given up after 2 restarts, 2 of them without a new checkpoint; last status 137"
    assert restart(tmp_path, "75 75 KILL done", "--times", "2") == (137, line, "done")
    assert restart(tmp_path, "step step step done", "--times", "1")[0] == 0
    assert restart(tmp_path, "0 done", "--times", "0")[::2] == (1, "done")


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_is_passed_on_as_usr1_and_ends_it(tmp_path, name):
    (tmp_path / "plan").write_text("step wait done")
    with subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "waits").exists)
        process.send_signal(getattr(signal, f"SIG{name}"))
        line = process.communicate(timeout=30)[1].splitlines()[-1]
    assert (process.returncode, (tmp_path / "plan").read_text()) == (75, "done")
    assert (tmp_path / "told").read_text() == "SIGUSR1"
    assert line == f"restart.sh: stopped by SIG{name} (status 75), after 1 restarts; to be started again"


def test_the_time_limit_is_no_failure(tmp_path):
    line = "restart.sh: stopped by the time limit, after 0 restarts; to be started again"
    soon = str(int(time.time()) + 60)
    assert restart(tmp_path, "75 done", SLURM_JOB_END_TIME=soon) == (75, line, "done")
    assert restart(tmp_path, "75 done", more=["--stop-after", ".5"]) == (75, line, "done")
    assert restart(tmp_path, "75 done", more=["--stop-after=6e2"])[0] == 0
    assert restart(tmp_path, "KILL done", SLURM_JOB_END_TIME=str(int(time.time()) + 3600))[0] == 0


@pytest.mark.parametrize("arguments", [[], ["--times", "x", "--", "true"], ["--times"], ["true", "--output", "here"]])
def test_bad_input_is_one_line_and_status_2(arguments):
    result = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("restart.sh: error: ")


def test_it_may_be_sourced(tmp_path):
    (tmp_path / "plan").write_text("75 done")
    program = f'source {SCRIPT}; restart -- "$@"; echo status $?'
    words = ["bash", "-c", program, "bash", *command(tmp_path)[2:]]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.stdout == "status 0\n"


def test_a_run_that_loses_a_rank_ends_with_the_undisturbed_model(tmp_path):
    training = ["--algorithm", "k-avg", "--k", "4", "--epochs", "6", "--checkpoint-steps", "60"]
    training += ["--on-failure", "restart"]
    undisturbed = run(2, [*training, "--output", tmp_path / "whole"], timeout=150)
    assert undisturbed.status == 0, undisturbed.err
    folder = tmp_path / "run"
    training += ["--resume", "auto", "--output", str(folder)]
    words = [SCRIPT, mpirun(), "-np", "2", *FLAGS, sys.executable, "-m", "hpcavg", *training]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(), **pipes) as process:
        wait_for((folder / "checkpoints" / "latest").exists)
        os.kill(pid_of_rank(folder, 1), signal.SIGKILL)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert err.splitlines()[-1] == "restart.sh: done, after 1 restarts"
    assert "going on from step" in out
    models = [json.loads((at / "summary.json").read_text())["parameters_sha256"] for at in (tmp_path / "whole", folder)]
    assert models[0] == models[1]
