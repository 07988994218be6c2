"""A task file: digits, with steps that last until the job has been requeued twice.

`STEP_S` is what each step sleeps; what it computes does not depend on it.
"""

import dataclasses
import os
import time

import torch
from torch.nn.functional import cross_entropy

from hpcavg.tasks import digits

STEP_S = float(os.environ.get("STEP_S", 0)) if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 2 else 0


def task(config):
    def loss(output, target):
        if torch.is_grad_enabled():
            time.sleep(STEP_S)
        return cross_entropy(output, target)

    return dataclasses.replace(digits.task(config), loss=loss)
