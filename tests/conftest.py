"""Settings for every test, and what makes a run on several MPI ranks safe to watch."""

import os
import sys

import hypothesis
import pytest

# All ranks must draw the same examples; examples that depend on time or a stored database would part them.
hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


def _ranks():
    if "mpi4py.MPI" not in sys.modules:
        return 0, 1
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    rank, _ = _ranks()
    if rank != 0:  # one rank's account of a passing run is enough
        reporter = config.pluginmanager.getplugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    rank, size = _ranks()
    if report.failed and size > 1:
        # The other ranks are in the middle of a collective that this one has left: end them all, saying why.
        from mpi4py import MPI

        sys.__stderr__.write(f"rank {rank} of {size}: {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        MPI.COMM_WORLD.Abort(1)
    return report


@pytest.fixture
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD
