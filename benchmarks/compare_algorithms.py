"""Every algorithm with its defaults on the embedded task, one run after the other: ``make compare``.

    python -m benchmarks.compare_algorithms [--ranks 4] [--json FILE] [options of hpcavg]

Prints accuracy, loss, averages, bytes and the share of time spent waiting; ends with status 1 where an accuracy is
below `--at-least`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpcavg import algorithms, summary


def main() -> int:
    """Run all algorithms, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--at-least", type=float, default=0.93, help="accuracy that every algorithm must reach [0.93]")
    parser.add_argument("--only", nargs="+", default=list(algorithms.ALGORITHMS), help="algorithms to run [all]")
    parser.add_argument("--json", type=Path, help="file for the summaries of all runs")
    options, passed_on = parser.parse_known_args()
    results: list[summary.Summary] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results.append(_run(name, options.ranks, Path(folder) / name, passed_on))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=130).print(_table(results))
    poor = [result["algorithm"] for result in results if not result["test_accuracy"] >= options.at_least]
    if poor:
        print(f"below {options.at_least}: {', '.join(poor)}")
    return 1 if poor else 0


def _run(name: str, ranks: int, folder: Path, passed_on: list[str]) -> summary.Summary:
    launcher = os.environ.get("MPIRUN", "mpirun")
    flags = shlex.split(os.environ.get("MPIRUN_FLAGS", "--oversubscribe --bind-to none"))
    program = [sys.executable, "-m", "hpcavg", "--algorithm", name, "--output", str(folder), *passed_on]
    done = subprocess.run([launcher, "-np", str(ranks), *flags, *program], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return summary.read(folder)


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
    sys.exit(main())
