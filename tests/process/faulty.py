"""A task file: digits, with the fault that FAULT=KIND:RANK:STEP asks for; RANK may be `all`, STEP 0 is the start."""

import dataclasses
import errno
import os
import resource
import shutil
import signal
import time

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

from hpcavg.averaging import health
from hpcavg.tasks import digits
from hpcavg.utils import files

KIND, RANK, STEP = os.environ["FAULT"].split(":")
IS_HERE = RANK in ("all", str(MPI.COMM_WORLD.Get_rank()))


def task(config):
    base = digits.task(config)
    models = []
    step = 0
    if IS_HERE and KIND == "no-space":
        files.perform = refuse_to_write

    def build_model():
        models[:] = [base.build_model()]
        return models[0]

    def loss(output, target):
        nonlocal step
        if torch.is_grad_enabled():
            step += 1
            if IS_HERE and step == int(STEP):
                FAULTS[KIND](config, models[0])
        elif IS_HERE and KIND == "slow":
            time.sleep(2)
        return cross_entropy(output, target)

    return dataclasses.replace(base, build_model=build_model, loss=loss)


def stop(config, model):
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_too_long(config, model):
    time.sleep(60)


def die(config, model):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(config, model):
    raise RuntimeError(f"rank {RANK} breaks")


def fall_sick(config, model):
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # in the middle of a step, which autograd must not see


def flip_a_bit(config, model):
    """Let the bit flip between the next mean and the comparison after it."""
    compare = health.compare

    def flip_and_compare(parts, topology, when):
        health.compare = compare
        parts["parameters"][0].view(-1).view(torch.int32)[7] ^= 1 << 20
        compare(parts, topology, when)

    health.compare = flip_and_compare


def lose_folder(config, model):
    shutil.rmtree(config.output)


def fill_disk(config, model):
    """Let no file grow beyond what the run has written so far, and no new one beyond a few kilobytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))


def refuse_to_write(call, *arguments):
    """Stand in for `files.perform` on a full disk: files can be made, and nothing be put into them."""
    if call is os.write:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return call(*arguments)


FAULTS = {
    "stop": stop,
    "sleep": sleep_too_long,
    "kill": die,
    "raise": fail,
    "nan": fall_sick,
    "flip": flip_a_bit,
    "vanish": lose_folder,
    "full": fill_disk,
}
