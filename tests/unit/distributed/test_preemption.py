"""When a run asks for its own end."""

import threading
import time
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.distributed.preemption import Deadline, Pause, PauseKind, Pauses, deadline
from hpcavg.distributed.supervisor import Supervisor
from hpcavg.errors import InputError


@pytest.mark.parametrize(
    ("stop_after_s", "environment", "found"),
    [
        (None, {}, None),
        (60.0, {}, Deadline(69.0, "--stop-after 60")),
        (None, {"SLURM_JOB_END_TIME": "2000"}, Deadline(890.0, "the Slurm job ends in 120 s")),
        (60.0, {"SLURM_JOB_END_TIME": "2000"}, Deadline(69.0, "--stop-after 60")),
        (5000.0, {"SLURM_JOB_END_TIME": "2000"}, Deadline(890.0, "the Slurm job ends in 120 s")),
    ],
)
def test_the_earlier_limit_counts(stop_after_s, environment, found):
    """By the clock that nobody sets: it is 10 s there, 1 s after the start, and 1000 s since 1970 on the other."""
    assert deadline(10.0, 1000.0, 1.0, stop_after_s, 120.0, environment) == found


def test_an_end_that_is_no_time_is_refused():
    with pytest.raises(InputError, match="SLURM_JOB_END_TIME='soon': must be a time in seconds since 1970"):
        deadline(0.0, 0.0, 0.0, None, 120.0, {"SLURM_JOB_END_TIME": "soon"})


@pytest.fixture
def topology():
    topology = Topology(MPI.COMM_SELF)
    yield topology
    topology.free()


@pytest.fixture
def supervisor():
    supervisor = Supervisor(MPI.COMM_SELF)
    yield supervisor
    supervisor.close()


def test_a_deadline_that_has_come_stops_the_run(supervisor, topology):
    pauses = Pauses(supervisor, topology, step=5, stop_at=Deadline(0.0, "the end"))
    pause = None
    step = 5
    while pause is None:
        step += 1
        pause = pauses.end_step(step)
    assert pause == (PauseKind.STOP, "the end")


def test_the_time_limit_follows_no_wall_clock(supervisor, topology, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    stop_at = Deadline(time.monotonic() + 3600, "--stop-after 3600")
    pauses = Pauses(supervisor, topology, stop_at=stop_at)
    now = stop_at.time_s - 1
    assert (pauses.poll(now), pauses.requested) == (1.0, PauseKind.NOTHING)
    pauses.poll(stop_at.time_s)
    assert pauses.requested is PauseKind.STOP


def test_steps_are_counted_one_by_one(supervisor, topology):
    pauses = Pauses(supervisor, topology, step=5)
    assert pauses.end_step(6) is None
    with pytest.raises(ValueError, match="step 8 ended, but step 7 is the current one"):
        pauses.end_step(8)


def test_where_steps_differ_ranks_agree_where_they_stand_together(supervisor, topology):
    pauses = Pauses(supervisor, topology, by_step=False)
    assert pauses.agree_now() is None
    pauses.request(PauseKind.CHECKPOINT, "ten minutes have passed")
    pauses.request(PauseKind.STOP, "the time is up")
    pauses.request(PauseKind.CHECKPOINT, "ten minutes have passed")
    assert pauses.end_step(1) is None
    assert pauses.requested is PauseKind.STOP
    assert pauses.agree_now() == (PauseKind.STOP, "the time is up")
    assert pauses.agree_now() is None


def test_a_request_outlives_an_agreement_that_a_death_interrupts(supervisor, topology, monkeypatch):
    """`hpcavg.distributed.shrinking` takes again what did not come to its end everywhere."""

    def carry_out_twice(action, what):
        action()
        return action()

    pauses = Pauses(supervisor, topology, by_step=False)
    pauses.request(PauseKind.STOP, "SIGTERM")
    monkeypatch.setattr(topology, "run_collective", carry_out_twice)
    assert pauses.agree_now() == (PauseKind.STOP, "SIGTERM")
    assert pauses.requested is PauseKind.NOTHING


def test_survivors_pause_where_one_of_them_may_stand_already(supervisor, topology):
    """One knows the step that was agreed on; to this rank the news of it has not come."""
    pauses = Pauses(supervisor, topology, step=5)
    stop = Pause(PauseKind.STOP, "SIGTERM")
    with supervisor.changed:
        pauses.receive(0, "hold")
        pauses.restart([None, (7, stop), (3, Pause(PauseKind.CHECKPOINT, "the clock"))])
    assert [pauses.end_step(step) for step in (6, 7, 8)] == [None, stop, None]


def test_survivors_forget_a_pause_that_is_over(supervisor, topology):
    pauses = Pauses(supervisor, topology, step=5)
    with supervisor.changed:
        pauses.restart([(5, Pause(PauseKind.CHECKPOINT, "the clock"))])
    pauses.request(PauseKind.STOP, "SIGTERM")
    step, pause = 5, None
    while pause is None:
        step += 1
        pause = pauses.end_step(step)
    assert pause == (PauseKind.STOP, "SIGTERM")


def test_a_rank_that_is_held_goes_where_the_death_is_met(supervisor, topology, monkeypatch):
    """Who would have told it how far to go may be the one that died."""

    def recover(action, what):
        with pytest.raises(MPI.Exception):
            action()
        supervisor.is_quiet = False
        with supervisor.changed:
            pauses.restart([None])

    monkeypatch.setattr(topology, "run_retryable", recover)
    pauses = Pauses(supervisor, topology)
    with supervisor.changed:
        supervisor.is_quiet = True
        pauses.receive(0, "hold")
    assert pauses.end_step(1) is None


def test_a_server_passes_on_what_it_is_asked_for():
    sent = []
    supervisor = SimpleNamespace(
        changed=threading.Condition(),
        rank=2,
        add=lambda *_: None,
        wake=lambda: None,
        send=lambda *what: sent.append(what),
    )
    pauses = Pauses(supervisor, SimpleNamespace(is_server=True, num_servers=1))
    pauses.request(PauseKind.STOP, "SIGTERM")
    pauses.poll(time.monotonic())
    pauses.poll(time.monotonic())
    assert sent == [("pauses", 0, "ask", (PauseKind.STOP, "SIGTERM"))]


def test_rank_0_makes_the_requests_of_servers_its_own(supervisor, topology):
    pauses = Pauses(supervisor, topology)
    supervisor.send("pauses", 0, "ask", Pause(PauseKind.STOP, "SIGUSR1"))
    supervisor.wake()
    step, pause = 0, None
    while pause is None:
        step += 1
        pause = pauses.end_step(step)
        time.sleep(0.001)
    assert pause == (PauseKind.STOP, "SIGUSR1")
