"""Runs that earlier forms of hpcavg left. Each stays readable by `report` and resumable.

A run is a folder, or an archive of one where its HDF5 files, mostly unused space, would weigh too much.
"""

import shutil
import tarfile
from pathlib import Path

DATA = Path(__file__).parent / "data"
NAMES = ["d2269b3/dasgd", "d2269b3/diloco", "e7aff81/hier-avg"]
"""By the revision that wrote them. The last one was resumed once, has a learning rate schedule and a loss scaler."""


def copy_run(name, place):
    """Copy the run `name` into the folder `place`; return the copy."""
    folder = DATA / name
    if folder.is_dir():
        return shutil.copytree(folder, place / folder.name, symlinks=True)
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since Python 3.11.4
    with tarfile.open(folder.with_name(f"{folder.name}.tar.xz")) as archive:
        archive.extractall(place, **safely)
    return place / folder.name
