"""A program that resumes the runs of earlier versions, and compares where they end to runs of now from the start.

Run it on 2 ranks, with a folder to write to; it prints a line for each run.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from mpi4py import MPI

from hpcavg.checkpoints.store import load_model
from hpcavg.cli import parsers
from hpcavg.results.view import read_view
from hpcavg.training.trainer import Trainer
from tests.old_runs import NAMES, copy_run

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
    for name in NAMES:
        resumed, new = (place / kind / Path(name).name for kind in ("resumed", "new"))
        if world.rank == 0:
            for folder in (resumed, new):
                folder.parent.mkdir(exist_ok=True)
            copy_run(name, resumed.parent)
        world.Barrier()
        assert train("--config", resumed / "config.toml", "--output", new)[0] == 0
        status, shown = train("--resume", resumed)
        assert (status, world.rank > 0 or "going on from step 13" in shown) == (0, True), shown
        if world.rank == 0:
            summaries = [json.loads((folder / "summary.json").read_text()) for folder in (resumed, new)]
            alike = all(summaries[0][key] == summaries[1][key] for key in ("steps", "samples", "global_averages"))
            has_metrics = (resumed / "metrics" / "rank-00000.h5").exists()  # not kept of all of them
            steps = read_view(resumed / "metrics", "step")["step"][:, 0 if has_metrics else 13 :]
            counted = steps.tolist() == [list(range(1 if has_metrics else 14, STEPS + 1))] * 2
            print(name, alike, counted, largest_difference(resumed, new), flush=True)


if __name__ == "__main__":
    main()
