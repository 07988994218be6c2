"""What a run leaves in its folder, and reports of it."""

import os

# Before h5py is imported: parallel file systems may refuse HDF5's locks. Each rank has its own file; readers use SWMR.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")
