"""A program in which one rank gets signals at random moments of small runs; see `tests.process.signalling`.

Each signal of ``--signals`` comes in a run of its own; SIGSTOP, which ends the job, must be the last. Rank 0 says how
the runs ended.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

from hpcavg.averaging.server import Server
from hpcavg.cli import parsers
from hpcavg.distributed import signals, watchdog
from hpcavg.tasks import digits
from hpcavg.training import trainer as train_module
from hpcavg.training.trainer import Trainer
from hpcavg.utils.exit_status import ExitStatus

STEPS, STEP_S = 240, 0.004
# What comes later than so long before the end need not be heeded.
LAST_S = 0.3
ASYNCHRONOUS = ("downpour", "eamsgd")
world = MPI.COMM_WORLD
progress = []  # what this rank has done in the run: steps, or messages of learners taken
take = Server._take


def take_and_note(*arguments):
    progress.append(time.monotonic())
    return take(*arguments)


Server._take = take_and_note


def task(config):
    """Return the digits, with steps of random lengths."""

    def loss(output, target):
        if torch.is_grad_enabled():
            time.sleep(random.uniform(0, 2 * STEP_S))
        return cross_entropy(output, target)

    return dataclasses.replace(digits.task(config), loss=loss)


def say(*words):
    print(f"rank {world.rank}:", *words, flush=True, file=sys.__stdout__)


def arguments(algorithm, folder, num_servers, timeout_s):
    """Return the command line of a run."""
    given = ["--algorithm", algorithm, "--task", f"{__file__}:task", "--model", "logistic", "--steps", STEPS]
    given += ["--hang-timeout", timeout_s, "--resume", "auto", "--output", folder, "--flush-seconds", 60]
    if num_servers:
        return [*given[: given.index("--resume")], *given[given.index("--resume") + 2 :], "--num-servers", num_servers]
    if algorithm == "pr-sgd-hetero":
        given += ["--local-steps", ",".join(str(9 - 2 * rank) for rank in range(world.size))]
    return [*given, "--checkpoint-minutes", 0]


def train(given, folder, moment=None, number=None, is_watched=False):
    """Train, and send this process a signal at that share of the run, if it is given one; below 0 while it is set up.

    Returns the exit status, what was shown, and how long before the first rank's last step the signal came.
    """
    shown, sent, over = io.StringIO(), [], []

    def send():
        if moment < 0:
            time.sleep(-moment)
        else:
            while len(progress) < moment * whole and not over:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.3 if over else 0.02))  # not the same place of a step always
        sent.append(time.monotonic())
        say("sends itself", signal.Signals(number).name)
        if number == signal.SIGSTOP:
            (folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), number)

    progress.clear()
    whole = STEPS  # about as many messages as a server gets, too
    thread = threading.Thread(target=send, name="sender")

    def watch_over(*given):
        watch = watchdog.watch_over(*given)
        if is_watched:  # whoever is stopped before everybody watches is not missed as it should be
            world.Barrier()
            if number is not None:
                thread.start()
        return watch

    train_module.watch_over = watch_over
    if number is not None and not is_watched:
        thread.start()
    with contextlib.redirect_stdout(shown):
        trainer = Trainer(parsers.parse_train(list(map(str, given))))
        make_loop, conclude = trainer._make_loop, trainer._conclude

        def make_noting_loop():
            loop = make_loop()
            take_step = loop._train_step

            def note_and_take_step():
                progress.append(time.monotonic())
                take_step()

            loop._train_step = note_and_take_step
            return loop

        def note_and_conclude(result):
            over.append(time.monotonic())
            return conclude(result)

        trainer._make_loop, trainer._conclude = make_noting_loop, note_and_conclude
        status = trainer.train()
    if number is not None:
        thread.join()
    # Who has taken its last step finishes; one of them may be ahead of all others.
    last_s = world.allreduce(math.inf if trainer.topology.is_server else progress[-1], MPI.MIN)
    left_s = last_s - world.allreduce(sent[0] if sent else 0.0, MPI.SUM)
    signals._early_signals.clear()
    return status, shown.getvalue(), left_s


def outcome(number, folder, status, shown, left_s, algorithm):
    """Return how a run ended that got SIGTERM or SIGUSR1: in a word, and in detail where that is wrong."""
    name = signal.Signals(number).name
    if status == 0:
        return "complete" if left_s < LAST_S else f"LOST {left_s:.2f} s before the end"
    summary = folder / "summary.json"
    if f" by {name}; " not in shown or status != (
        ExitStatus.FAILED if algorithm in ASYNCHRONOUS else ExitStatus.REQUEUE
    ):
        return f"WRONG status {status}: {shown}"
    if algorithm in ASYNCHRONOUS:
        is_told = "there is no checkpoint to go on from" in shown
        return "stopped" if is_told and json.loads(summary.read_text())["completed"] is False else f"WRONG {shown}"
    return "stopped" if (folder / "checkpoints" / "latest" / "manifest.json").exists() else f"WRONG {shown}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm")
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--servers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGTERM", "SIGUSR1", "SIGSTOP"])
    parser.add_argument("--moment", type=float, help="see `train`; unset: by the seed")
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    signals.remember_early_signals()
    say("is process", os.getpid())
    own = random.Random(f"{options.algorithm} {options.target} {options.seed}")
    for name in options.signals:
        number, folder = signal.Signals[name], options.folder / name
        moment = own.choice([own.uniform(-0.5, -0.1), *(own.uniform(0, 1.1) for _ in range(3))])
        moment = moment if options.moment is None else options.moment
        timeout_s = options.timeout if name == "SIGSTOP" else 60
        given = arguments(options.algorithm, folder, options.servers, timeout_s)
        world.Barrier()
        say("begins", name)
        result = train(
            given, options.folder, moment, number if world.rank == options.target else None, name == "SIGSTOP"
        )
        if name == "SIGSTOP":
            say("ends", name, "over")
            continue
        how = outcome(number, folder, *result, options.algorithm) if world.rank == 0 else None
        if world.bcast(how) == "stopped" and not options.servers:
            status, shown, _ = train(given, options.folder)
            if status != 0 or (world.rank == 0 and "going on from step" not in shown):
                how = f"WRONG resumed with status {status}: {shown}"
        if world.rank == 0:
            say("ends", name, " ".join(how.split()))
    world.Barrier()


if __name__ == "__main__":
    main()
