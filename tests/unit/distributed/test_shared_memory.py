"""Memory that a node's ranks share leaves nothing behind."""

import os
import subprocess
import sys

import pytest
from mpi4py import MPI

from hpcavg.distributed import shared_memory


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, new, alive, foreign = f"hpcavg-{dead.pid}-a", f"hpcavg-{dead.pid}-b", f"hpcavg-{os.getpid()}-c", "x-1"
    for name in (old, new, alive, foreign):
        (tmp_path / name).write_bytes(b"")
        if name != new:
            os.utime(tmp_path / name, (0, 0))
    memory = shared_memory.map_shared_memory(MPI.COMM_SELF, 100, (str(tmp_path),))
    assert len(memory) == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new, alive, foreign])
    assert old not in os.listdir(tmp_path)


def test_what_cannot_be_mapped_is_an_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_address_space(*arguments):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", no_address_space)
    with pytest.raises(OSError, match="not all of its ranks can map"):
        shared_memory.map_shared_memory(MPI.COMM_SELF, 100, (str(tmp_path),))
    assert list(tmp_path.iterdir()) == []
