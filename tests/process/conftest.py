"""Which of these tests run beside each other under pytest-xdist: all but those that share a run."""

from xdist.scheduler import LoadScopeScheduling

SHARING = ("test_benchmarks.py", "test_runs.py")


class BesideEachOther(LoadScopeScheduling):
    """Gives each process one test after the other, and the tests of a file that share a run to one process."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return file if file.endswith(SHARING) else nodeid


def pytest_xdist_make_scheduler(config, log):
    return BesideEachOther(config, log)
