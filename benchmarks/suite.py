"""Run the benchmarks of a preset, one after the other, and write one folder with a page of their results.

    python -m benchmarks.suite --preset quick [--output FOLDER] [--ranks N] [--launcher TEMPLATE] [--only NAME ...]

Do not start it under mpirun: it starts mpirun, or `--launcher`, for each benchmark. Inside a Slurm or LSF job there are
as many ranks as the job has tasks. A benchmark that fails or takes too long is marked on the page, and the exit status
is 1. SIGINT (Ctrl-C), SIGTERM and SIGHUP end the benchmark that runs; the page shows those before it, and the exit
status is 128 + the signal's number. `benchmarks.compare` compares two such folders.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import launching, page
from benchmarks.cluster import ClusterError, check_requirements, parse
from benchmarks.options import Parser, chosen, run
from benchmarks.presets import HANDED_ON, PRESETS
from benchmarks.results import Outcome, Record, Suite, over_best, read_record
from hpcavg.errors import InputError, require_integer, require_number, why
from hpcavg.utils.progress import is_terminal

_LOOK_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_VARIABLES = ("OMPI_", "PRTE_", "PMIX_", "UCX_", "FI_", "GLOO_", "MPICH_", "OMP_", "MPIRUN", "SLURM_JOB_", "LSB_JOBID")


class Stop:
    """Remembers the signal that asks the suite to end; `number` is None until then."""

    def __init__(self) -> None:
        self.number: int | None = None
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: setattr(self, "number", number))


def main() -> int:
    """Run a preset and return the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--preset", default="quick", help=f"how much, of: {', '.join(PRESETS)} [quick]")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="new or empty [runs/suite-PRESET-TIME]")
    parser.add_argument("--ranks", type=int, default=launching.default_ranks(), help="[those of the job, or 4]")
    launching.add_option(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="benchmarks of the preset to run [all]")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="for one benchmark [the preset's]")
    parser.add_argument("--wire-gbit", type=float, help="bandwidth between nodes in Gbit/s, for benchmarks.mean")
    parser.add_argument("--interface", help="network interface for gloo, for benchmarks.mean and benchmarks.training")
    options = parser.parse_args()
    chosen("preset", [options.preset], PRESETS)
    preset = PRESETS[options.preset]
    names = chosen("only", options.only, preset.runs)
    require_integer("ranks", options.ranks, 1)
    deadline_s = preset.deadline_s if options.deadline is None else options.deadline
    require_number("deadline", deadline_s, lambda seconds: seconds > 0, "a positive number")
    _check_alone()
    _check_clusters(options.preset)
    handed_on = {name: getattr(options, name) for name in HANDED_ON if getattr(options, name) is not None}
    launching.launch(options.launcher, options.ranks, [])
    folder = _make_folder(options.output or Path(f"runs/suite-{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"))
    suite = Suite(
        preset=options.preset,
        command=[*sys.orig_argv],
        started_in=os.getcwd(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=[*os.getloadavg()],
        variables=_variables(launching.environment()),
    )
    for name in names:
        words = shlex.split(preset.runs[name])
        taken = {key: value for key, value in handed_on.items() if words[0] in HANDED_ON[key]}
        words += [f"--{key.replace('_', '-')}={value}" for key, value in taken.items()]
        launcher, ranks = options.launcher, options.ranks
        if name in preset.clusters:
            launcher, ranks = on_cluster(preset.clusters[name])
        program = command(words, launcher, ranks, folder / f"{name}.json")
        suite.outcomes.append(Outcome(name, program, ranks=ranks))
    stop = Stop()
    console = Console(force_terminal=is_terminal(), soft_wrap=True, highlight=False, markup=False)
    try:
        _run_all(suite, folder, deadline_s, stop, console)
    except OSError as error:
        raise InputError("output", folder, f"a folder that can be written ({why(error)})") from error
    states = [outcome.state for outcome in suite.outcomes]
    console.print(f"{states.count('done')} of {len(states)} done: {folder / page.PAGE}")
    if stop.number is not None:
        return 128 + stop.number
    return int("failed" in states)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that MPI and its networks read."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_VARIABLES) and "_ALLOW_RUN_AS_ROOT" not in name
    }


def command(words: list[str], launcher: str, ranks: int, json_file: Path) -> list[str]:
    """Return the command for the module and options in `words`; `compare_algorithms` starts its ranks itself."""
    program = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:], "--json", str(json_file)]
    if words[0] == "compare_algorithms":
        return [*program, "--ranks", str(ranks), "--launcher", launcher]
    return launching.launch(launcher, ranks, program)


def on_cluster(options: str) -> tuple[str, int]:
    """Return the launcher for emulated nodes, and the number of their ranks; `options` are of `benchmarks.cluster`."""
    cluster, _ = parse([*shlex.split(options), "--", "true"])
    return f"{shlex.quote(sys.executable)} -m benchmarks.cluster {options} --", sum(cluster.slots)


def _check_clusters(preset: str) -> None:
    """Raise `InputError` if the preset needs emulated nodes, which cannot be made here."""
    if PRESETS[preset].clusters:
        try:
            check_requirements()
        except ClusterError as error:
            raise InputError("preset", preset, f"without emulated nodes here: benchmarks.cluster {error}") from error


def _check_alone() -> None:
    """Raise `InputError` if a launcher has started several processes of the suite."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "1") != "1":
            raise InputError(name, os.environ[name], "1 or unset: the suite starts mpirun itself")


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise InputError("output", path, "a new or empty folder")
        if not os.access(path, os.W_OK | os.X_OK):
            raise InputError("output", path, "a folder that can be written")
    except OSError as error:
        raise InputError("output", path, f"a folder that can be made ({why(error)})") from error
    return path


def _run_all(suite: Suite, folder: Path, deadline_s: float, stop: Stop, console: Console) -> None:
    """Run all benchmarks; update the folder after each."""
    from benchmarks import plots  # imports matplotlib, which takes seconds

    records: dict[str, Record] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Once a second: the benchmark needs the cores.
    bar = Progress(*columns, console=console, refresh_per_second=1, disable=not is_terminal())
    with bar as progress:
        task = progress.add_task("", total=len(suite.outcomes))
        for outcome in suite.outcomes:
            if stop.number is not None:
                outcome.reason = f"{signal.Signals(stop.number).name} ended the suite"
                continue
            progress.update(task, description=outcome.name)
            run_one(outcome, folder / f"{outcome.name}.txt", deadline_s, stop)
            record = take_record(outcome, folder / f"{outcome.name}.json")
            if record is not None:
                records[outcome.name] = record
                plots.draw(record, outcome.name, folder)
                plots.draw_over_best(over_best(records), folder)
            _write(suite, folder, records)
            why_not = f": {outcome.reason}" if outcome.reason else ""
            progress.console.print(f"{outcome.name} {outcome.state} in {outcome.wall_s:.1f} s{why_not}")
            progress.advance(task)
    _write(suite, folder, records)


def run_one(outcome: Outcome, output: Path, deadline_s: float, stop: Stop) -> None:
    """Run one benchmark with its output in the file `output`, and set its `outcome`."""
    started = time.monotonic()
    with output.open("wb") as out:
        process = subprocess.Popen(
            outcome.command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=launching.environment(),
            start_new_session=True,
        )
        while process.poll() is None and not outcome.reason:
            if stop.number is not None:
                outcome.reason = f"{signal.Signals(stop.number).name} ended it"
            elif time.monotonic() - started > deadline_s:
                outcome.reason = f"it took longer than {deadline_s:g} s"
            time.sleep(_LOOK_S)
        if outcome.reason:
            launching.end(process)
        elif process.returncode:
            outcome.reason = f"it ended with status {process.returncode}"
    outcome.wall_s = time.monotonic() - started
    outcome.state = "failed" if outcome.reason else "done"


def take_record(outcome: Outcome, path: Path) -> Record | None:
    """Return the record of a run, if there is one. A run without one, or on another number of ranks, has failed."""
    if not path.exists():
        outcome.state, outcome.reason = "failed", outcome.reason or "it has left no figures"
        return None
    try:
        record = read_record(path)
    except InputError as error:
        outcome.state, outcome.reason = "failed", outcome.reason or str(error)
        return None
    seen = record.environment.get("ranks")
    if seen != outcome.ranks:  # the launcher is not of this MPI: each rank saw itself alone
        outcome.state, outcome.reason = "failed", f"MPI saw {seen} ranks, not {outcome.ranks}; see --launcher"
    return record


def _write(suite: Suite, folder: Path, records: dict[str, Record]) -> None:
    suite.write(folder)
    page.write(folder, suite, records)


if __name__ == "__main__":
    run(main)
