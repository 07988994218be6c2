"""Run every algorithm with its defaults on the embedded task, one after the other: ``make compare``.

    python -m benchmarks.compare_algorithms [--ranks 4] [--launcher TEMPLATE] [--json FILE] [options of hpcavg]

Prints accuracy, loss, averages, bytes and the share of time spent waiting. The exit status is 1 if an accuracy is below
`--at-least`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import launching
from benchmarks.options import Parser, chosen, run
from hpcavg import algorithms
from hpcavg.results import summary


def main() -> int:
    """Run all algorithms, print the table, return the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("--ranks", type=int, default=launching.default_ranks(), help="[those of the job, or 4]")
    launching.add_option(parser)
    parser.add_argument("--at-least", type=float, default=0.93, help="accuracy that every algorithm must reach [0.93]")
    parser.add_argument("--only", nargs="+", metavar="ALGORITHM", help="algorithms to run [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the summaries of all runs")
    options, passed_on = parser.parse_known_args()
    launcher = launching.launch(options.launcher, options.ranks, [])
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results: list[summary.Summary] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen("only", options.only, algorithms.ALGORITHMS):
            print(f"{name} ...", file=sys.stderr, flush=True)
            results.append(_run(name, launcher, Path(folder) / name, passed_on))
        where = _environment(Path(folder) / name, results[-1]) | {"date": started, "command": sys.orig_argv}
    if options.json:
        record = {
            "benchmark": "compare_algorithms",
            "environment": where,
            "options": {**vars(options), "passed_on": passed_on},
            "results": {result["algorithm"]: _without_nan(result) for result in results},
        }
        options.json.write_text(json.dumps(record, indent=2, default=str, allow_nan=False) + "\n")
    Console(width=130).print(_table(results))
    poor = [result["algorithm"] for result in results if not result["test_accuracy"] >= options.at_least]
    if poor:
        print(f"below {options.at_least}: {', '.join(poor)}")
    return 1 if poor else 0


def _run(name: str, launcher: list[str], folder: Path, passed_on: list[str]) -> summary.Summary:
    program = [sys.executable, "-m", "hpcavg", "--algorithm", name, "--output", str(folder), *passed_on]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, env=launching.environment())
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return summary.read(folder)


def _environment(folder: Path, result: summary.Summary) -> dict[str, Any]:
    """Return the environment of a run, in the form of other benchmarks."""
    told = json.loads((folder / "environment.json").read_text())
    names = sorted(set(told.pop("nodes")))
    return {**told, "ranks": result["num_ranks"], "nodes": result["num_nodes"], "node_names": names}


def _without_nan(result: summary.Summary) -> dict[str, Any]:
    """Return the summary with None in place of NaN, which JSON lacks."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in result.items()}


def _table(results: list[summary.Summary]) -> Table:
    table = Table()
    heads = (
        "algorithm",
        "learners",
        "accuracy",
        "test loss",
        "train loss",
        "global",
        "local",
        "exchanges",
        "MB",
        "blocked",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "algorithm" else "right")
    for result in results:
        share = result["averaging_blocked_s"] / result["wall_s"]
        table.add_row(
            result["algorithm"].replace("_", "-"),
            str(result["num_learners"]),
            f"{result['test_accuracy']:.4f}",
            f"{result['test_loss']:.4f}",
            f"{result['train_loss']:.4f}",
            str(result["global_averages"]),
            str(result["local_averages"]),
            str(result["exchanges"]),
            f"{result['bytes_averaged'] / 1e6:.1f}",
            f"{share:.1%}",
        )
    return table


if __name__ == "__main__":
    run(main)
