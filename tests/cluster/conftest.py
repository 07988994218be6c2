"""Emulated clusters for tests, which need root and iproute2: `make test-cluster`."""

import pytest

from benchmarks.cluster import Cluster, ClusterError, check_requirements


@pytest.fixture(scope="session")
def make_cluster():
    """Return `Cluster` where this machine can hold one; what it lacks is a failure, not a reason to skip."""
    try:
        check_requirements()
    except ClusterError as error:
        pytest.fail(f"an emulated cluster {error}", pytrace=False)
    return Cluster


@pytest.fixture(scope="session")
def two_nodes(make_cluster):
    """Two nodes of two ranks on cables without a limit."""
    return make_cluster((2, 2), yields=True)
