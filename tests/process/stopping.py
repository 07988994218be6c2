"""A program that trains with many options, twice each: once to the end, once stopped by signals, and resumed.

Both must leave the same, or the exit status is 1. Run it on 3 ranks; one line for each, and `end`. With --device cuda
it trains on GPUs.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from mpi4py import MPI

from hpcavg.cli import parsers
from hpcavg.training.trainer import Trainer
from hpcavg.utils.exit_status import ExitStatus
from tests.process.resuming import differences, outcome, write_task

OPTIONS = [
    "--algorithm sync-sgd --optimizer adam --learning-rate 0.003",
    "--algorithm sync-sgd --variant gradients --optimizer adamw --learning-rate 0.003 --schedule cosine",
    "--algorithm one-shot --buffers recompute",
    "--algorithm k-avg --k 5 --optimizer-state average --buffers keep --nesterov --loader-threads 2",
    "--algorithm k-avg --k 7 --optimizer adam --optimizer-state average --partition shared --consensus-distance",
    "--algorithm hier-avg --k1 2 --k2 6 --group-size 2 --optimizer-state reset --check-rounds 1",
    "--algorithm hier-avg --k1 3 --k2 9 --group-size 2 --dtype float64 --buffers recompute --schedule one-cycle",
    "--algorithm post-local-sgd --switch-step 20 --k 4 --schedule step --warmup-steps 6",
    "--algorithm pr-sgd --interval 6 --schedule cosine --warmup-steps 4",
    "--algorithm pr-sgd-time-varying",
    "--algorithm pr-sgd-hetero --local-steps 6,4,2",
    "--algorithm pr-sgd-hetero --local-steps 5,5,2 --schedule one-cycle --optimizer-state average",
    "--algorithm lupa --tau auto",
    "--algorithm lupa --tau 6 --mu 0.5 --shift 50 --buffers keep",
    "--algorithm ada-lupa --tau0 3 --growth loss",
    "--algorithm dasgd --tau 5 --delay 4 --dtype float64 --partition shared --buffers keep",
    "--algorithm dasgd --tau 5 --delay 4 --optimizer-state reset --engine mpi",
    "--algorithm slowmo --k 4 --optimizer adamw --learning-rate 0.003 --precision fp16 --clip-norm 1",
    "--algorithm diloco --h 7 --optimizer adamw --optimizer-state average --learning-rate 0.003",
    "--algorithm diloco --h 7 --engine mpi --buffers recompute",
]
world = MPI.COMM_WORLD


def train(arguments, stop_step=None):
    """Train; if `stop_step` is given, rank 1 is sent a signal in that step of its. Return the exit status."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(parsers.parse_train(list(map(str, arguments))))
        gradients, steps = trainer.passes.gradients, 0

        def signalled(inputs, targets):
            nonlocal steps
            steps += 1
            if steps == stop_step and world.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return gradients(inputs, targets)

        trainer.passes.gradients = signalled
        return trainer.train()


def both_ways(folder, options, own):
    """Return what differs between the two runs, and where the second was stopped."""
    arguments = [*options.split(), "--task", f"{folder}/noisy.py:task", "--steps", steps, "--batch-size", 8]
    arguments += ["--checkpoint-minutes", 0, "--flush-seconds", 60, "--device", chosen.device]
    assert train([*arguments, "--output", folder / "whole"]) == 0
    stops, status = [], ExitStatus.REQUEUE
    while status == ExitStatus.REQUEUE:
        stops.append(own.randint(1, steps // 2) if len(stops) < chosen.stops else None)
        status = train([*arguments, "--output", folder / "stopped", "--resume", "auto"], stops[-1])
    assert status == 0, status
    return differences(outcome(folder / "whole"), outcome(folder / "stopped")) if world.rank == 0 else [], stops


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--stops", type=int, default=1, help="how often to stop each at most")
parser.add_argument("--only", default="algorithm", help="options with one of these words in them")
parser.add_argument("--device", default="cpu")
chosen = parser.parse_args()
own = random.Random(chosen.seed)
steps = 50 if chosen.stops > 1 else 30
any_differs = False
for options in OPTIONS:
    if any(word in options for word in chosen.only.split(",")):
        folder = Path(world.bcast(tempfile.mkdtemp() if world.rank == 0 else None))
        if world.rank == 0:
            write_task(folder)
        world.Barrier()
        found, stops = both_ways(folder, options, own)
        world.Barrier()
        any_differs |= bool(found)
        if world.rank == 0:
            print(f"{'DIFFERS' if found else 'same'} {options} {stops} {found}", flush=True)
            shutil.rmtree(folder)
if world.rank == 0:
    print("end", flush=True)
sys.exit(any_differs)
