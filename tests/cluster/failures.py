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
TOLD = re.compile(r"warning: step \d+: lost rank ([\d, ]+); \d+ learners? went on after ([\d.]+) s")


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
    options += ["--schedule", "cosine"]  # the last one learns from few samples: its accuracy would leap to the end
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
    for ranks, seconds in losses_in(output):
        outcome.lost.append(ranks)
        outcome.recovery_s.append(seconds)
    if (folder / "summary.json").exists():
        outcome.summary = json.loads((folder / "summary.json").read_text())
    return outcome


def kill_in_turn(lines, folder, deaths, chance):
    """Read `lines` to their end; kill the ranks of the next of `deaths` three epochs after the last loss was told.

    At a random moment of about an epoch, that is. What is read may be old: mpirun may hold lines back for a second.
    """
    read, pids, started, missed, epochs = [], {}, None, set(), 0
    waiting = list(deaths)
    for line in lines:
        read.append(line)
        missed.difference_update(rank for ranks, _ in losses_in(line) for rank in ranks)
        if not line.startswith("epoch"):
            continue
        now = time.monotonic()
        if not pids:
            pids = {rank: pid_of_rank(folder, rank) for death in deaths for rank in death}
        epochs = 0 if missed else epochs + 1
        if waiting and epochs == 3:
            time.sleep(chance.uniform(0, now - started))
            missed, epochs = set(waiting.pop(0)), 0
            for rank in missed:
                os.kill(pids[rank], signal.SIGKILL)
        started = time.monotonic()
    return "".join(read)


def losses_in(output):
    """Return the ranks and the seconds of every loss that `output` tells of."""
    return [([int(rank) for rank in ranks.split(",")], float(seconds)) for ranks, seconds in TOLD.findall(output)]


def check(outcome):
    """Fail unless the others finished, agreed, and learnt as usual."""
    assert outcome.status == 0, outcome.output + outcome.error
    lost = [rank for ranks in outcome.lost for rank in ranks]
    killed = [rank for ranks in outcome.killed for rank in ranks]
    assert sorted(lost) == sorted(killed), outcome.output + outcome.error
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
