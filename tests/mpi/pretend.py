"""A GPU made of ordinary memory, for the engines' data flow: copies wait in a queue until somebody synchronises."""

import contextlib

import torch

from hpcavg.engines.gpu.cuda import Cuda


class _Stream:
    def __init__(self):
        self.queued, self.num_done = [], 0

    @property
    def place(self):
        return self.num_done + len(self.queued)

    def run(self, place):
        while self.num_done < place:
            target, source = self.queued.pop(0)
            target.copy_(source)
            self.num_done += 1


class _Mark:
    def __init__(self, stream):
        self.stream, self.place = stream, stream.place

    def synchronize(self):
        self.stream.run(self.place)


class PretendCuda(Cuda):
    """Every array is on the device unless it was made or page-locked here.

    Copies to and from the device take place when their stream is synchronised, and not before: what is read too early
    is stale, what is overwritten too early spoils the copy. eager : copy at once, for users who synchronise nothing,
    as a loop on a GPU need not. `stream` is the current one; tests may put in another.
    """

    def __init__(self, eager=False):
        self.eager = eager
        self.stream = _Stream()
        self.locked, self.num_pinned = [], 0
        self.in_own_stream = 0

    def holds(self, array):
        return array.data_ptr() not in [host.data_ptr() for host in self.locked]

    def copy(self, target, source):
        self.stream.queued.append((target, source))
        if self.eager:
            self.synchronize(target.device)

    def synchronize(self, device):
        self.stream.run(self.stream.place)

    def mark(self, device):
        return _Mark(self.stream)

    def new_stream(self):
        self.stream = _Stream()

    def to_device(self, values, device):
        return values.clone()

    @contextlib.contextmanager
    def own_stream(self, device):
        self.in_own_stream += 1
        yield

    def pinned(self, form):
        self.num_pinned += 1
        made = torch.full(form.shape, float("nan"), dtype=form.dtype)
        self.locked.append(made)
        return made

    def page_lock(self, host, owner):
        self.locked.append(host)
