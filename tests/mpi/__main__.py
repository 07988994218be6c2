"""Runs tests/mpi on each number of ranks, two jobs at a time, and prints what a failed one said.

``python -m tests.mpi 1 2 3 4 8``. The ranks are forked from a process that has imported what all of them need.
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.launching import mpirun
from tests.process.launch import FLAGS, environment
from tests.process.warm import Server

DEADLINE_S = 900


def run(server, num_ranks):
    """Run the tests on `num_ranks` ranks; return whether they passed."""
    pytest = server.command("mpi4py", ["-m", "pytest", "-q", "--color=no", "--with-mpi", "tests/mpi"])
    job = subprocess.run(
        [mpirun(), "-np", str(num_ranks), *FLAGS, *pytest],
        env=environment(**server.variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=DEADLINE_S,
    )
    lines = job.stdout.splitlines() or [""]
    print(f"== tests/mpi on {num_ranks} ranks", *lines[-1 if job.returncode == 0 else 0 :], sep="\n", flush=True)
    return job.returncode == 0


def main():
    all_num_ranks = sorted(map(int, sys.argv[1:]), reverse=True)  # the longest first
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        # torch._dynamo: DistributedDataParallel imports it.
        server = Server(Path(folder) / "warm", environment(), ["torch._dynamo"])
        passed = list(pool.map(lambda num_ranks: run(server, num_ranks), all_num_ranks))
        server.close()
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
