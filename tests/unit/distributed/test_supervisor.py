"""What the thread hears."""

import os
import signal
import threading

import pytest
from mpi4py import MPI

from hpcavg.distributed.supervisor import Supervisor


@pytest.fixture
def supervisor():
    supervisor = Supervisor(MPI.COMM_SELF)
    yield supervisor
    supervisor.close()


def test_no_signal_is_lost_among_calls_to_look(supervisor):
    """Steps are short, and the thread may not come to look for many of them."""
    heard = threading.Event()
    supervisor.on_signal(signal.SIGUSR1, lambda number: heard.set())
    with supervisor.changed:
        for _ in range(10_000):
            supervisor.wake()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.wait(timeout=10)


def test_a_call_to_look_is_never_missed(supervisor):
    for _ in range(1000):
        done = threading.Event()
        supervisor.later(done.set)
        assert done.wait(timeout=0.4)  # without a call it looks every half second
