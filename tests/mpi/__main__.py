"""Runs tests/mpi on each number of ranks, two jobs at a time, and prints what a failed one said.

``python -m tests.mpi 1 2 3 4 8``. The ranks are forked from a process that has imported torch.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from tests.process import launch


def run(num_ranks):
    """Run the tests on `num_ranks` ranks; return whether they passed."""
    pytest = ["-m", "pytest", "-q", "--color=no", "--with-mpi", "tests/mpi"]
    result = launch.run(num_ranks, pytest, timeout=900, module="mpi4py")
    lines = (result.out + result.err).splitlines() if result.status else result.out.splitlines()[-1:]
    print(f"== tests/mpi on {num_ranks} ranks", *lines, sep="\n", flush=True)
    return result.status == 0


def main():
    launch.warm_server()  # one for both threads
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(run, sorted(map(int, sys.argv[1:]), reverse=True)))  # the longest first
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
