"""Is `python -m hpcavg`, but ranks die, or fail, when they come to some function for the nth time.

python -m tests.process.dying --where hpcavg.metrics:Recorder.flush --ranks 0 --time 2 -- --algorithm k-avg
"""

import argparse
import os
import pkgutil
import signal

from hpcavg.__main__ import main
from hpcavg.launcher import launcher_rank


def end_at(place, time, fails):
    """Kill this process, or raise an exception in it, when `place` is called for the given time."""
    name, _, function = place.rpartition(".")
    owner = pkgutil.resolve_name(name)
    original, calls = getattr(owner, function), []

    def replacement(*arguments, **options):
        calls.append(None)
        if len(calls) == time:
            if fails:
                raise RuntimeError(f"told to fail in {function}")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, function, replacement)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", required=True, metavar="MODULE:CLASS.FUNCTION")
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--time", type=int, default=1)
    parser.add_argument("--fails", action="store_true", help="raise an exception instead")
    parser.add_argument("rest", nargs="*", metavar="-- ARGUMENTS")
    options = parser.parse_args()
    if launcher_rank() in options.ranks:
        end_at(options.where, options.time, options.fails)
    main(options.rest)
