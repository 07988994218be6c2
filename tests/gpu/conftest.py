"""Tests that need a GPU fail without one. They are no part of `make test`: `make test-gpu` runs them."""

import pytest
import torch

from hpcavg.machine.devices import choose_device


def pytest_sessionstart(session):
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a CUDA device and a torch built for it", returncode=2)


@pytest.fixture
def device(topology):
    return choose_device("cuda", topology.node_rank)
