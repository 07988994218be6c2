"""A program that resumes the runs of an earlier version, and compares where they end to runs of now from the start.

Run it on 2 ranks, with a folder to write to; it prints a line for each run.
"""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

from mpi4py import MPI

from hpcavg.checkpoints.store import load_model
from hpcavg.cli import parsers
from hpcavg.results.metrics import read_view
from hpcavg.training.trainer import Trainer

OLD = Path(__file__).parents[1] / "data" / "d2269b3"
STEPS = 20
world = MPI.COMM_WORLD


def train(*arguments):
    """Train to step 20; return the exit status and what was shown."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = Trainer(parsers.parse_train([*map(str, arguments), "--steps", str(STEPS)])).train()
    return status, shown.getvalue()


def largest_difference(left, right):
    """Return the largest difference of two runs' final models, relative to the largest value."""
    models = [load_model(folder / "checkpoints" / "final.safetensors") for folder in (left, right)]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][name] - value).abs().max() / value.abs().max()) for name, value in models[1].items())


def main():
    """Resume each, and train it from the start."""
    place = Path(sys.argv[1])
    for old in sorted(OLD.iterdir()):
        resumed, new = place / old.name, place / f"{old.name}-new"
        if world.rank == 0:
            shutil.copytree(old, resumed, symlinks=True)
        world.Barrier()
        status, shown = train("--resume", resumed)
        assert (status, world.rank > 0 or "going on from step 13" in shown) == (0, True), shown
        assert train("--config", old / "config.toml", "--output", new)[0] == 0
        if world.rank == 0:
            summaries = [json.loads((folder / "summary.json").read_text()) for folder in (resumed, new)]
            alike = all(summaries[0][name] == summaries[1][name] for name in ("steps", "samples", "global_averages"))
            has_metrics = (resumed / "metrics" / "rank-00000.h5").exists()  # kept of one of them only
            steps = read_view(resumed / "metrics", "step")["step"][:, 0 if has_metrics else 13 :]
            counted = steps.tolist() == [list(range(1 if has_metrics else 14, STEPS + 1))] * 2
            print(old.name, alike, counted, largest_difference(resumed, new), flush=True)


if __name__ == "__main__":
    main()
