"""Shards are the same, bit for bit, for any number of ranks that prepare them, and so is what is said of them."""

import shutil
import tempfile
from pathlib import Path

import pytest
from mpi4py import MPI

from hpcavg.data import imagenet
from hpcavg.errors import InputError


@pytest.fixture
def folder(world):
    """Return a folder that is the same on all ranks."""
    path = world.bcast(tempfile.mkdtemp() if world.Get_rank() == 0 else None)
    yield Path(path)
    world.Barrier()
    if world.Get_rank() == 0:
        shutil.rmtree(path)


def test_ranks_share_the_work(world, folder, monkeypatch):
    monkeypatch.setattr(imagenet, "IMAGES_PER_SHARD", 3)
    if world.Get_rank() == 0:
        imagenet.synthesize(folder / "set", 1e-9, seed=1)  # 16 and 4 images: 6 and 2 shards
        imagenet.prepare(folder / "set", folder / "alone", 16, MPI.COMM_SELF)
    world.Barrier()
    imagenet.prepare(folder / "set", folder / "together", 16, world)
    if world.Get_rank() == 0:
        alone, together = ({p.name: p.read_bytes() for p in (folder / f).iterdir()} for f in ("alone", "together"))
        assert len(alone) == 2 * (6 + 2) + 3
        assert together == alone
    imagenet.check(str(folder / "together"), world)
    if world.Get_rank() == 0:
        for name in ("train-00003.bin", "val-00001.bin"):
            damaged = folder / "alone" / name
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    world.Barrier()
    with pytest.raises(InputError, match="2 of its 10 files are damaged"):
        imagenet.check(str(folder / "alone"), world)
    if world.Get_rank() == 0:
        (folder / "set" / "train" / "n00000002" / "gone.JPEG").symlink_to("nowhere")
    world.Barrier()
    with pytest.raises(InputError, match=r"gone\.JPEG"):  # met by one rank, raised on all
        imagenet.prepare(folder / "set", folder / "broken", 16, world)
    with pytest.raises(InputError, match="begun with other files"):
        imagenet.prepare(folder / "set", folder / "together", 16, world)
