"""A soak test of ``--on-failure shrink``: run after run in which ranks are killed.

    python -m benchmarks.soak [--kills 100] [--seed N] [--json FILE]

Each run trains digits on 4 to 8 ranks with one of the algorithms and kills all but one or two of the ranks. Each dies
at its own place (`benchmarks.soak_task.PLACES`), some two at once, some during the recovery from another death. A run
is good if it ends with status 0, reports each death, leaves survivors with the same parameters bit for bit that have
recorded each of their steps once, and has the usual accuracy. The exit status is 1 if any run is not good.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import launching
from benchmarks.soak_task import LEAVING, PLACES, PLAN
from hpcavg.results import summary, view

STEPS = 500
_CHECKPOINT_STEPS = 50
# How many steps the places of one event may be apart: after any step, a mean is due within so many steps.
_REACH_STEPS = 32
_ALL = dict.fromkeys(("computation", "mean for an evaluation", "evaluation", "flush of records", "checkpoint"), 1)
_BLOCKING = {**_ALL, "global average": 3}
_LATE = ("final average", "summary")
# The options of each algorithm, the phases of its runs, and the weight of each phase.
ALGORITHMS: dict[str, tuple[str, dict[str, int]]] = {
    "hier-avg": ("--k1 4 --k2 32", {**_BLOCKING, "local average": 3}),
    "dasgd": (
        "--tau 4 --delay 2",
        {
            **_ALL,
            "start of a delayed average": 2,
            "delayed average on its way": 3,
            "merge of a delayed average": 2,
        },
    ),
    "k-avg": ("--k 8", _BLOCKING),
    "gossip": ("--topology ring --k 2", {**_ALL, "ring average": 3}),
    "slowmo": ("--k 8", _BLOCKING),
    "diloco": ("--h 16", _BLOCKING),
    "ada-lupa": ("--tau0 4 --growth loss", {**_BLOCKING, "agreement on a round": 1}),
    # An evaluation follows a mean, so it needs none of its own.
    "pr-sgd-hetero": ("--base-steps 8", {**_BLOCKING, "mean for an evaluation": 0, "agreement on a round": 1}),
    "sync-sgd": ("--variant gradients", _BLOCKING),
}


@dataclass
class Kill:
    """A rank that dies at the first passage of `place` at `step` or later; `rank` is its number at the start."""

    rank: int
    place: str
    step: int


@dataclass
class Outcome:
    """A run and its outcome.

    Attributes
    ----------
    algorithm : its name.
    arguments : the options of hpcavg.
    num_ranks : at the start.
    kills : the planned deaths.
    faults : what is wrong with the run.
    accuracy : on the test samples.
    wall_s : seconds of training, mean over the survivors.
    recovery_s : seconds of recovery, of every survivor and every loss.
    lost_s : seconds of recovery and of interrupted collectives, mean over the survivors.
    steps : the steps that survivors have recorded.
    steps_due : the steps that they should have recorded.
    """

    algorithm: str
    arguments: str
    num_ranks: int
    kills: list[Kill]
    faults: list[str] = field(default_factory=list)
    accuracy: float = 0.0
    wall_s: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    lost_s: float = 0.0
    steps: int = 0
    steps_due: int = 0

    @property
    def num_survivors(self) -> int:
        """How many ranks should survive."""
        return self.num_ranks - len(self.kills)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak, print its tables, return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="ranks to kill, in all runs together [100]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan [0]")
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS), metavar="ALGORITHM")
    parser.add_argument("--ranks", type=int, nargs="+", choices=range(3, 17), default=[4, 5, 6, 7, 8], metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of every learner [{STEPS}]")
    parser.add_argument("--at-least", type=float, default=0.95, help="accuracy that every run must reach [0.95]")
    parser.add_argument("--deadline", type=float, default=240.0, help="a run that takes longer hangs [240]")
    parser.add_argument("--undisturbed", action="store_true", help="also run every algorithm without kills")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files of bad runs in FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes to FILE, after every run")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="show the outcomes in such files instead")
    options = parser.parse_args(arguments)
    if options.show:
        show([_outcome(each) for path in options.show for each in json.loads(path.read_text())])
        return 0
    if options.steps < 4 * _REACH_STEPS:
        parser.error(f"--steps {options.steps}: allowed is {4 * _REACH_STEPS} or more")
    outcomes: list[Outcome] = []
    for run in plans(options):
        with tempfile.TemporaryDirectory() as folder:
            run_one(run, Path(folder), options)
            if run.faults and options.keep:
                shutil.copytree(folder, options.keep / Path(folder).name)
        outcomes.append(run)
        _tell(run)
        if options.json:
            options.json.write_text(json.dumps([asdict(each) for each in outcomes], indent=1) + "\n")
    show(outcomes)
    return int(any(run.faults for run in outcomes))


# -- plans ----------------------------------------------------------------------------------------------------------


def plans(options: argparse.Namespace) -> Iterator[Outcome]:
    """Yield runs until they kill enough ranks; with ``--undisturbed``, first one of each algorithm without kills."""
    if options.undisturbed:
        for name in options.only:
            yield Outcome(name, arguments(name, 2, "auto", options.steps), 6, [])
    choice = random.Random(options.seed)
    decks: dict[str, list[str]] = {name: [] for name in options.only}
    left, turn = options.kills, 0
    while left > 0:
        name = options.only[turn % len(options.only)]
        num_ranks = choice.choice(options.ranks)
        group_size = choice.choice([2, 3])
        engine = choice.choice(["auto", "auto", "auto", "mpi"])
        num_kills = min(left, num_ranks - choice.choice([1, 2, 2]))
        kills = _kills(name, num_ranks, group_size, engine, num_kills, options.steps, decks[name], choice)
        yield Outcome(name, arguments(name, group_size, engine, options.steps), num_ranks, kills)
        left -= len(kills)
        turn += 1


def arguments(name: str, group_size: int, engine: str, steps: int) -> str:
    """Return the options of hpcavg for a run."""
    own, _ = ALGORITHMS[name]
    return (
        f"--algorithm {name} {own} --group-size {group_size} --engine {engine} --steps {steps} --schedule cosine"
        f" --checkpoint-steps {_CHECKPOINT_STEPS} --check-rounds 1 --on-failure shrink"
    )


def _kills(
    name: str,
    num_ranks: int,
    group_size: int,
    engine: str,
    number: int,
    steps: int,
    deck: list[str],
    choice: random.Random,
) -> list[Kill]:
    """Return `number` kills, spread over the run; some are two at once, some during a recovery."""
    alive = list(range(num_ranks))
    events: list[list[str]] = []  # the places of ranks that die together
    while number:
        places = [_deal(name, deck, choice)]
        if number > 1 and choice.random() < 0.4:
            places.append(choice.choice([places[0], _in_recovery(choice)]))
        events.append(places)
        number -= len(places)
    if choice.random() < 0.4:
        late = _LATE[1:] if name in ("ada-lupa", "pr-sgd-hetero") else _LATE  # which may end with a mean
        events[-1] = [_pick(choice.choice(late), choice), *events[-1][1:]]
    kills: list[Kill] = []
    for index, places in enumerate(events):
        step = (index + 1) * (steps - _REACH_STEPS) // (len(events) + 1) + choice.randrange(8)
        if places[0].startswith(_LATE):
            step = steps
        for place in places:
            possible = alive
            if place == "checkpoint: manifest":  # the first rank writes it
                possible = [min(alive)]
            elif place == "local average: half":  # a mean of one is nothing
                groups = Counter(rank // group_size for rank in alive)
                possible = [rank for rank in alive if groups[rank // group_size] > 1]
            if place == "delayed average on its way: half" and (engine == "mpi" or len(alive) < 2):
                place = "delayed average on its way: after"
            if place == "local average: half" and not possible:
                place, possible = "local average: before", alive
            rank = choice.choice(possible)
            alive.remove(rank)
            kills.append(Kill(rank, place, step - (_REACH_STEPS - 8 if place.startswith("recovery") else 0)))
    return kills


def _deal(name: str, deck: list[str], choice: random.Random) -> str:
    """Return the next place of the algorithm's deck; a deck has all places of its runs, by weight."""
    if not deck:
        _, shares = ALGORITHMS[name]
        deck.extend(f"{what}: {place}" for what, share in shares.items() for place in PLACES[what] * share)
        choice.shuffle(deck)
    return deck.pop()


def _in_recovery(choice: random.Random) -> str:
    return _pick("recovery", choice)


def _pick(what: str, choice: random.Random) -> str:
    return f"{what}: {choice.choice(PLACES[what])}"


# -- runs -----------------------------------------------------------------------------------------------------------


def run_one(run: Outcome, folder: Path, options: argparse.Namespace) -> None:
    """Run one run in `folder` and check what it has left."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps([asdict(kill) for kill in run.kills]))
    task = f"{Path(__file__).with_name('soak_task.py')}:task"
    launcher = launching.launch(launching.default_launcher(), run.num_ranks, ["--with-ft", "ulfm"])
    program = [sys.executable, "-m", "hpcavg", *run.arguments.split(), "--task", task, "--output", str(folder / "run")]
    with (folder / "out").open("w+") as out:
        process = subprocess.Popen(
            [*launcher, *program],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**launching.environment(), PLAN: str(plan)},
            start_new_session=True,
        )
        try:
            status = process.wait(options.deadline)
        except subprocess.TimeoutExpired:
            run.faults.append(f"it hung\n{_stacks(process.pid)}")
            status = launching.end(process)
        if status:
            run.faults.append(f"status {status}")
    if not run.faults:
        try:
            _check(run, folder, options)
        except (OSError, ValueError) as error:
            run.faults.append(str(error))
    if run.faults:
        run.faults.append((folder / "out").read_text()[-8000:])


def _check(run: Outcome, folder: Path, options: argparse.Namespace) -> None:
    """Compare what the survivors have left with what they should have."""
    left = summary.read(folder / "run")
    survivors = [json.loads(path.read_text()) for path in sorted(folder.glob("survivor-*.json"))]
    expected = sorted(set(range(run.num_ranks)) - {kill.rank for kill in run.kills})
    ranks = sorted(each["rank"] for each in survivors)
    if ranks != expected:
        run.faults.append(f"ranks {ranks} survived, not {expected}")
    leaving = {kill.rank for kill in run.kills if kill.place == LEAVING}
    for each in survivors:
        lost = {rank for loss in each["losses"] for rank in loss}
        if (lost ^ {kill.rank for kill in run.kills}) - leaving:
            run.faults.append(f"rank {each['rank']} reports the loss of {sorted(lost)}")
        run.recovery_s += each["recovery_s"]
        run.lost_s += (sum(each["recovery_s"]) + each["interrupted_s"]) / len(survivors)
    if len({each["sha256"] for each in survivors}) != 1:
        run.faults.append("survivors differ")
    run.accuracy, run.wall_s = left["test_accuracy"], left["wall_s"]
    if run.accuracy < options.at_least:
        run.faults.append(f"accuracy {run.accuracy:.4f}")
    recorded = view.read_view(folder / "run" / "metrics", "step")["step"]
    for rank in ranks:
        own = [step for step in recorded[rank].tolist() if step >= 0]
        due = options.steps if "hetero" not in run.algorithm else max(own)  # at their own pace
        run.steps += len(set(own))
        run.steps_due += due
        if own != list(range(1, due + 1)):
            run.faults.append(f"rank {rank} recorded {len(own)} steps, {len(set(own))} of {due}")


def _stacks(root: int) -> str:
    """Return the stacks of a job's ranks, if py-spy is installed."""
    tool = shutil.which("py-spy")
    if tool is None:
        return "(py-spy would show where)"
    pids = launching.descendants(root)
    dumps = (subprocess.run([tool, "dump", "--pid", str(pid)], capture_output=True, text=True) for pid in pids)
    return "\n".join(dump.stdout for dump in dumps)


# -- tables -----------------------------------------------------------------------------------------------------------


def _outcome(values: dict[str, Any]) -> Outcome:
    """Return an outcome as ``--json`` wrote it."""
    return Outcome(**{**values, "kills": [Kill(**kill) for kill in values["kills"]]})


def _tell(run: Outcome) -> None:
    """Print a run, its kills and its faults."""
    places = ", ".join(f"{kill.rank} in {kill.place} from {kill.step}" for kill in run.kills)
    took = f"{run.wall_s:.1f} s, recovery {sum(run.recovery_s) / max(1, run.num_survivors):.2f} s"
    print(f"{time.strftime('%H:%M:%S')} {run.algorithm} on {run.num_ranks}: accuracy {run.accuracy:.4f}, {took};")
    print(f"    {places or 'no kills'}", flush=True)
    for fault in run.faults:
        print(f"    FAULT: {fault}\n    {run.arguments}", flush=True)


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the tables: by algorithm, and where ranks were killed."""
    console = Console(width=160)
    table = Table(box=box.MARKDOWN)
    heads = ("algorithm", "runs", "good", "kills", "accuracy", "undisturbed", "steps kept", "time kept")
    for head in (*heads, "less interrupted", "recovery: median", "95%", "longest"):
        table.add_column(head, justify="left" if head == "algorithm" else "right")
    for name in [*dict.fromkeys(run.algorithm for run in outcomes), "all"]:
        table.add_row(name, *_row([run for run in outcomes if name in (run.algorithm, "all")]))
    console.print(table)
    table = Table("killed in", "kills", "of which", box=box.MARKDOWN)
    counts = Counter(kill.place for run in outcomes for kill in run.kills)
    for what, places in PLACES.items():
        here = {place: counts[f"{what}: {place}"] for place in places}
        table.add_row(what, str(sum(here.values())), ", ".join(f"{place} {count}" for place, count in here.items()))
    console.print(table)


def _row(runs: Sequence[Outcome]) -> list[str]:
    hit: list[Any] = [run for run in runs if run.kills]
    still = [run for run in runs if not run.kills]
    times = sorted(seconds for run in hit for seconds in run.recovery_s)
    spans = [run.wall_s * run.num_survivors for run in hit]
    recovery_s = sum(times)
    lost_s = sum(run.lost_s * run.num_survivors for run in hit)
    return [
        str(len(hit)),
        str(sum(not run.faults for run in hit)),
        str(sum(len(run.kills) for run in hit)),
        f"{min((run.accuracy for run in hit), default=0):.4f}",
        f"{min(run.accuracy for run in still):.4f}" if still else "",
        f"{sum(run.steps for run in hit) / max(1, sum(run.steps_due for run in hit)):.2%}",
        f"{1 - recovery_s / max(1e-9, sum(spans)):.2%}",
        f"{1 - lost_s / max(1e-9, sum(spans)):.2%}",
        *(f"{value:.3f} s" for value in _quantiles(times)),
    ]


def _quantiles(ordered: Sequence[float]) -> list[float]:
    """Return the median, the 95 % quantile and the largest of sorted values; nothing if there are none."""
    if not ordered:
        return []
    return [statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], ordered[-1]]


if __name__ == "__main__":
    sys.exit(main())
