"""When a run asks for its own end."""

import pytest
from mpi4py import MPI

from hpcavg.errors import InputError
from hpcavg.pauses import Deadline, Kind, Pauses, deadline
from hpcavg.supervisor import Supervisor


@pytest.mark.parametrize(
    ("stop_after_s", "environment", "found"),
    [
        (None, {}, None),
        (60.0, {}, Deadline(1060.0, "--stop-after 60")),
        (None, {"SLURM_JOB_END_TIME": "2000"}, Deadline(1880.0, "the Slurm job ends in 120 s")),
        (60.0, {"SLURM_JOB_END_TIME": "2000"}, Deadline(1060.0, "--stop-after 60")),
        (5000.0, {"SLURM_JOB_END_TIME": "2000"}, Deadline(1880.0, "the Slurm job ends in 120 s")),
    ],
)
def test_the_earlier_limit_counts(stop_after_s, environment, found):
    assert deadline(1000.0, stop_after_s, 120.0, environment) == found


def test_an_end_that_is_no_time_is_refused():
    with pytest.raises(InputError, match="SLURM_JOB_END_TIME='soon': must be a time in seconds since 1970"):
        deadline(0.0, None, 120.0, {"SLURM_JOB_END_TIME": "soon"})


@pytest.fixture
def supervisor():
    supervisor = Supervisor(MPI.COMM_SELF)
    yield supervisor
    supervisor.close()


def test_a_deadline_that_has_come_stops_the_run(supervisor):
    pauses = Pauses(supervisor, step=5, stop_at=Deadline(0.0, "the end"))
    pause = None
    step = 5
    while pause is None:
        step += 1
        pause = pauses.end_step(step)
    assert pause == (Kind.STOP, "the end")


def test_steps_are_counted_one_by_one(supervisor):
    pauses = Pauses(supervisor, step=5)
    assert pauses.end_step(6) is None
    with pytest.raises(ValueError, match="step 8 ended where step 7 was being taken"):
        pauses.end_step(8)


def test_where_steps_differ_ranks_agree_where_they_stand_together(supervisor):
    pauses = Pauses(supervisor, by_step=False)
    assert pauses.agree_now(MPI.COMM_SELF) is None
    pauses.request(Kind.CHECKPOINT, "ten minutes have passed")
    pauses.request(Kind.STOP, "the time is up")
    pauses.request(Kind.CHECKPOINT, "ten minutes have passed")
    assert pauses.end_step(1) is None
    assert pauses.requested is Kind.STOP
    assert pauses.agree_now(MPI.COMM_SELF) == (Kind.STOP, "the time is up")
    assert pauses.agree_now(MPI.COMM_SELF) is None
