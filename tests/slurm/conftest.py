"""One Slurm for all tests, which need root: `make test-slurm`."""

import pytest

from tests.slurm.slurm import Slurm, SlurmError


@pytest.fixture(scope="session")
def slurm():
    """Two nodes; what this machine lacks for them is a failure, not a reason to skip."""
    try:
        running = Slurm(nodes=2, cpus=8).__enter__()
    except SlurmError as error:
        pytest.fail(f"Slurm: {error}", pytrace=False)
    yield running
    running.__exit__()
