"""Settings for every test, which of them run beside each other, and what makes a run on MPI ranks safe to watch."""

import gc
import os
import signal
import sys

import hypothesis
import pytest
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.training.eager import defer_compiler_import

# All ranks must draw the same examples; examples that depend on time or a stored database would part them.
hypothesis.settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("deterministic")


# Torch's optimizers would import its compiler on every rank: seconds of start-up that test nothing.
defer_compiler_import()


# Process tests that share a run.
SHARING = ("test_benchmarks.py", "test_runs.py")


# A shell's background jobs ignore SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class OneAfterTheOther(LoadScopeScheduling):
        """Gives out process tests one by one, and all others by file, since tests of a file share what they need."""

        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if "tests/process/" in file and not file.endswith(SHARING) else file

    return OneAfterTheOther(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    if _is_mpi_run(session.config) and MPI.COMM_WORLD.Get_rank() != 0:
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115  one rank's account of a passing run is enough


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    world = MPI.COMM_WORLD
    if report.failed and _is_mpi_run(item.config) and world.Get_size() > 1:
        # The other ranks are in the middle of a collective that this one has left: end them all, saying why.
        rank = f"rank {world.Get_rank()} of {world.Get_size()}"
        sys.__stderr__.write(f"{rank}: {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        world.Abort(1)
    return report


def _is_mpi_run(config):
    return config.getoption("--with-mpi")


def pytest_collection_finish(session):
    gc.freeze()  # or every full collection would look through all modules again


@pytest.fixture(scope="session")
def world():
    return MPI.COMM_WORLD


@pytest.fixture(scope="session")
def node():
    """Return the communicator of the ranks on this node: all of `world` unless the tests run on a cluster."""
    return MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED, key=MPI.COMM_WORLD.Get_rank())


@pytest.fixture
def topology(world):
    """Yield all ranks in local groups of two."""
    made = Topology(world, min(2, world.Get_size()))
    yield made
    made.free()
