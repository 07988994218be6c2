"""Training on an emulated cluster while ranks are killed at random moments; the others must go on.

python -m tests.cluster.failures --runs 10
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.cluster import Cluster
from tests.process.launch import pid_of_rank

SURVIVING = ["--with-ft", "ulfm", "--mca", "coll", "^han,cuda"]
ALGORITHMS = {
    "hier-avg": ["--k1", "4", "--k2", "16"],
    "dasgd": ["--tau", "4", "--delay", "2"],
}
TOLD = re.compile(r"warning: step (\d+): lost rank ([\d, ]+); (\d+) learners? went on after ([\d.]+) s")


@dataclass
class Outcome:
    """How a run went whose ranks were killed.

    killed : the ranks, death by death. lost : those that the run told of, loss by loss, and recovery_s what it took.
    """

    status: int
    killed: list[list[int]]
    output: str
    error: str
    lost: list[list[int]] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    summary: dict = field(default_factory=dict)


def train(cluster, algorithm, folder, deaths, seed, timeout_s=300):
    """Train on `cluster`; kill the ranks of each of `deaths` at once, each some time after the one before."""
    options = ["--on-failure", "shrink", "--check-rounds", "1", "--output", str(folder), "--epochs", "30"]
    program = ["python", "-m", "hpcavg", "--algorithm", algorithm, *ALGORITHMS[algorithm], *options]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with cluster.start(program, mpirun_flags=SURVIVING, text=True, **pipes) as process:
        errors = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        reader.start()
        deadline = threading.Timer(timeout_s, process.kill)
        deadline.start()
        output = kill_in_turn(process.stdout, folder, deaths, random.Random(seed))
        status = process.wait()
        deadline.cancel()
        reader.join()
    outcome = Outcome(status, deaths, output, errors[0])
    for _, ranks, _, seconds in TOLD.findall(output):
        outcome.lost.append([int(rank) for rank in ranks.split(",")])
        outcome.recovery_s.append(float(seconds))
    if (folder / "summary.json").exists():
        outcome.summary = json.loads((folder / "summary.json").read_text())
    return outcome


def kill_in_turn(lines, folder, deaths, chance):
    """Read `lines` to their end; every third epoch, kill the ranks of the next of `deaths` at a random moment."""
    read, pids, started = [], {}, None
    waiting = list(deaths)
    for line in lines:
        read.append(line)
        if not line.startswith("epoch"):
            continue
        epoch, now = int(line.split()[1]), time.monotonic()
        if epoch == 1:
            pids = {rank: pid_of_rank(folder, rank) for death in deaths for rank in death}
        if waiting and started is not None and epoch % 3 == 0:
            time.sleep(chance.uniform(0, now - started))
            for rank in waiting.pop(0):
                os.kill(pids[rank], signal.SIGKILL)
        started = time.monotonic()
    return "".join(read)


def check(outcome):
    """Fail unless the others finished, agreed, and learnt as usual."""
    assert outcome.status == 0, outcome.output + outcome.error
    lost = [rank for ranks in outcome.lost for rank in ranks]
    assert sorted(lost) == sorted(rank for ranks in outcome.killed for rank in ranks), outcome.output
    assert outcome.summary["completed"]
    assert outcome.summary["test_accuracy"] >= 0.95


def deaths_of(slots, chance):
    """Return who dies together and in which order: a whole node, then single ranks; one rank is left at least."""
    first = [sum(slots[:node]) for node in range(len(slots))]
    nodes = [list(range(start, start + size)) for start, size in zip(first, slots, strict=True)]
    chance.shuffle(nodes)
    deaths = [nodes[0], *([rank] for rank in nodes[1][:-1])]
    deaths += [ranks if chance.random() < 0.5 else ranks[:1] for ranks in nodes[2:]]
    chance.shuffle(deaths)
    return deaths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="number of runs [10]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims [0]")
    parser.add_argument("--slots", default="2,2;2,2,2", help="clusters to take in turn, by the ranks of their nodes")
    options = parser.parse_args()
    clusters = [tuple(int(size) for size in slots.split(",")) for slots in options.slots.split(";")]
    seconds, num_killed = [], 0
    for run in range(options.runs):
        chance = random.Random(options.seed + run)
        slots, algorithm = clusters[run // len(ALGORITHMS) % len(clusters)], list(ALGORITHMS)[run % len(ALGORITHMS)]
        deaths = deaths_of(slots, chance)
        folder = Path(tempfile.mkdtemp(prefix="hpcavg-failures-"), "run")
        started = time.monotonic()
        outcome = train(Cluster(slots, yields=True), algorithm, folder, deaths, options.seed + run)
        took_s = time.monotonic() - started
        accuracy = outcome.summary.get("test_accuracy")
        print(
            f"seed {options.seed + run} {algorithm} on {slots}: status {outcome.status}, killed {deaths},"
            f" lost {outcome.lost} in {outcome.recovery_s} s, accuracy {accuracy}, {took_s:.0f} s",
            flush=True,
        )
        try:
            check(outcome)
        except (AssertionError, KeyError):
            print(outcome.output, outcome.error, folder, sep="\n", flush=True)
        seconds += outcome.recovery_s
        num_killed += sum(map(len, deaths))
    if seconds:
        print(
            f"{num_killed} ranks killed; {len(seconds)} recoveries: median {median(seconds)} s, most {max(seconds)} s"
        )


if __name__ == "__main__":
    sys.exit(main())
