"""Sends SIGSTOP, SIGTERM and SIGUSR1 to every role of every algorithm at random moments, and looks at how runs end.

``python -m tests.process.signalling --seeds 10`` prints a line for each run; status 1 if one hung, lost a signal, left
a process behind or ended otherwise than docs/reliability.md says. A stopped rank must be named in time; a run that is
told to stop must do so with a checkpoint, and be resumed; one whose signal comes in its last moments may be complete.

``--start-up N`` sends signals to ``python -m hpcavg`` itself, N times, from the first moment of its processes on.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpcavg import algorithms
from tests.process.launch import start
from tests.process.resuming import is_running, kill_all, ranks_of
from tests.process.signalled import ASYNCHRONOUS

DEADLINE_S = 150
TIMEOUT_S = 2.0
# From the timeout until the report: answers are awaited, and threads are not always on time.
REPORT_S = 8.0
BAD = ("HANG", "LEFT", "LOST", "WRONG")


def cases(seeds, only=None):
    """Yield the algorithm, role, ranks, servers and target of each job, by seed."""
    for seed in seeds:
        for algorithm in algorithms.ALGORITHMS:
            name = algorithm.replace("_", "-")
            if only and name not in only:
                continue
            for role in ("first", "other", "server") if name in ASYNCHRONOUS else ("first", "other"):
                ranks = 2 + seed % 3
                servers = 0
                if name in ASYNCHRONOUS:
                    ranks = 3 + seed % 2
                    servers = 1 + (ranks == 4 and seed % 4 > 1)
                own = random.Random(f"{name} {role} {seed}")
                targets = {
                    "first": [0],
                    "other": range(1, ranks - servers),
                    "server": range(ranks - servers, ranks),
                }
                yield name, role, ranks, servers, own.choice(targets[role]), seed


def run_case(name, role, ranks, servers, target, seed):
    """Run one job; return a list of how its runs ended, by signal."""
    folder = Path(tempfile.mkdtemp(prefix="signalling-"))
    given = [name, "--target", target, "--servers", servers, "--seed", seed, "--timeout", TIMEOUT_S]
    process = start(ranks, [*given, "--folder", folder], module="tests.process.signalled")
    try:
        return judge(*follow(process, folder), folder, target)
    finally:
        kill_all(process)
        shutil.rmtree(folder, ignore_errors=True)


def follow(process, folder):
    """Return the status of a job, None where it hung, what it said, and which of its processes are left."""
    pids, is_woken, stopped = [], False, folder / "stopped"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(process.communicate, timeout=DEADLINE_S)
        while not ended.done():
            pids = ranks_of(process) or pids
            # At its very end nobody watches over a run any more, and nothing is left to be told.
            is_complete = (folder / "SIGSTOP" / "summary.json").exists()
            is_due = stopped.exists() and time.time() > stopped.stat().st_mtime + TIMEOUT_S + REPORT_S
            if is_complete and is_due and not is_woken:
                is_woken = True
                os.kill(int(stopped.read_text()), signal.SIGCONT)
            time.sleep(0.05)
    try:
        out, err = ended.result()
    except subprocess.TimeoutExpired as error:
        kill_all(process)
        return None, str(error.stdout), str(error.stderr), []
    return process.returncode, out.replace("\0", ""), err.replace("\0", ""), [pid for pid in pids if is_running(pid)]


def judge(status, out, err, left, folder, target):
    """Return how the runs of a job ended."""
    ended = re.findall(r"^rank 0: ends (SIGTERM|SIGUSR1) (.*)$", out, re.MULTILINE)
    if status is None:
        return [*ended, ("job", f"HANG {out} {err}")]
    if left:
        return [*ended, ("job", f"LEFT processes {left}")]
    if "Traceback" in err:
        return [*ended, ("job", f"WRONG {err}")]
    if "sends itself SIGSTOP" not in out:
        return [*ended, ("job", f"WRONG ended with {status}: {out} {err}")]
    told = re.search(r"hpcavg: hung: .* waiting in the (.*) for (.*) s; (.*)", err)
    if told is not None:
        is_right = told[3] == f"missing: rank {target}" and float(told[2]) < TIMEOUT_S + REPORT_S and status != 0
        return [*ended, ("SIGSTOP", f"told after {told[2]} s in {told[1]}" if is_right else f"WRONG {status} {err}")]
    is_complete = (folder / "SIGSTOP" / "summary.json").exists() and status == 0
    return [*ended, ("SIGSTOP", "complete" if is_complete else f"WRONG not told, status {status}: {out} {err}")]


# -- while a run is starting ----------------------------------------------------------------------------------------


def catches(pid, number):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & 1 << number - 1)


def start_up(seed):
    """Send a signal to a rank of a real run in its first seconds; return how it ended."""
    own = random.Random(f"start-up {seed}")
    number, ranks = own.choice([signal.SIGTERM, signal.SIGUSR1]), own.randint(2, 3)
    name = own.choice(["hier-avg", "dasgd", "pr-sgd-hetero", "downpour"])
    folder = Path(tempfile.mkdtemp(prefix="signalling-"))
    given = ["--algorithm", name, "--model", "logistic", "--steps", 10**6, "--output", folder / "run"]
    process = start(ranks, given)
    try:
        began = time.monotonic()
        while len(ranks_of(process)) < ranks:
            time.sleep(0.01)
        moment_s = own.uniform(0, 5)
        time.sleep(moment_s)
        pid = own.choice(ranks_of(process))
        is_heard = catches(pid, number)
        os.kill(pid, number)
        out, err = process.communicate(timeout=DEADLINE_S)
        what = f"{number.name} to {name} after {moment_s:.2f} s"
        if "Traceback" in err:
            return what, f"WRONG {err}"
        if not is_heard:  # nobody can, before Python runs hpcavg
            return what, "before Python" if process.returncode == 128 + number else f"WRONG {process.returncode} {err}"
        is_right = process.returncode == (1 if name in ASYNCHRONOUS else 75) and f" by {number.name}; " in out
        took_s = time.monotonic() - began - moment_s
        return what, f"stopped within {took_s:.1f} s" if is_right else f"WRONG status {process.returncode}: {out} {err}"
    except Exception as error:
        return f"start-up {seed}", f"HANG {error!r}"
    finally:
        kill_all(process)
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="+", help="algorithms")
    parser.add_argument("--start-up", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="jobs beside each other")
    options = parser.parse_args()
    counted = Counter()

    def note(about, runs):
        for what, how in runs:
            counted[what, how.split()[0]] += 1
            print(*about, what, how, flush=True)

    seeds = range(options.first, options.first + options.seeds)
    with ThreadPoolExecutor(options.at_once) as pool:
        started = list(pool.map(start_up, range(options.first, options.first + options.start_up)))
        for what, how in started:
            counted["start-up", how.split()[0]] += 1
            print("start-up", what, how, flush=True)
        all_cases = list(cases(seeds, options.only))
        for case, runs in zip(all_cases, pool.map(lambda case: run_case(*case), all_cases), strict=True):
            note(case, runs)
    print(json.dumps({" ".join(key): count for key, count in sorted(counted.items())}, indent=1))
    sys.exit(any(word in BAD for _, word in counted))


if __name__ == "__main__":
    main()
