"""Run every recipe for a few steps on few ranks, to see that it works.

    python -m benchmarks.recipes --data FOLDER [--ranks 2] [--steps 2] [--only RECIPE ...] [options of hpcavg]

FOLDER has the data of each task in a folder of the task's name: cifar10, imagenet, epsilon. A group size above the
number of learners is reduced to it. Prints each run with its time and, if it failed, its error; the exit status is then
1.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import launching
from benchmarks.options import Parser, chosen, run
from hpcavg.config import recipes
from hpcavg.config.options import Config
from hpcavg.config.sources import from_sources


def main() -> int:
    """Run all recipes, print the table, return the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the tasks' folders of data")
    parser.add_argument("--ranks", type=int, default=2, help="[2]")
    parser.add_argument("--steps", type=int, default=2, help="[2]")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="recipes to run [all]")
    parser.add_argument("--varied", action="store_true", help="also run the variations in their lines # Vary:")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for one run [600]")
    launching.add_option(parser)
    options, passed_on = parser.parse_known_args()
    launcher = launching.launch(options.launcher, options.ranks, [])
    table = Table("recipe", "options", "wall s", "status", "the last line it wrote")
    failed = 0
    for name in chosen("only", options.only, recipes.names()):
        for varied in [{}, *(recipes.variations(name) if options.varied else [])]:
            config = from_sources(name, varied)
            arguments = [f"--{option.replace('_', '-')}={value}" for option, value in varied.items()]
            print(name, *arguments, "...", file=sys.stderr, flush=True)
            scaled = [*_fitting(config, options.ranks), f"--steps={options.steps}"]
            if options.data is not None:
                scaled.append(f"--data-dir={options.data / config.problem.task}")
            wall_s, status, said = _run(
                launcher, [f"--config={name}", *arguments, *scaled, *passed_on], options.timeout
            )
            failed += status != "0"
            table.add_row(name, " ".join(arguments), f"{wall_s:.1f}", status, "" if status == "0" else said)
    Console(width=200).print(table)
    return int(failed > 0)


def _fitting(config: Config, ranks: int) -> list[str]:
    """Return the options with which the recipe fits on `ranks` ranks."""
    learners = ranks - config.servers_of(ranks)
    return [f"--group-size={learners}"] if (config.roles.group_size or 0) > learners else []


def _run(launcher: list[str], arguments: list[str], timeout_s: float) -> tuple[float, str, str]:
    """Return the seconds and the status of a run, and the last line of its standard error."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "hpcavg", *arguments, "--output", f"{folder}/run"]
        process = subprocess.Popen(
            [*launcher, *program],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=launching.environment(),
            start_new_session=True,
        )
        try:
            _, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            launching.end(process)
            return time.monotonic() - started, "timeout", f"still running after {timeout_s:g} s"
    own = [line for line in err.splitlines() if "hpcavg: error" in line] or err.splitlines()
    return time.monotonic() - started, str(process.returncode), own[-1] if own else ""


if __name__ == "__main__":
    run(main)
