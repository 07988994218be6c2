"""Runs many of the programs of `tests.process.mismatching`, a new job wherever one has ended.

``python -m tests.process.mismatches --programs 200`` prints how each ended; status 1 if one hung, differed or crashed.
"""

import argparse
import re
import sys
from collections import Counter

from tests.process.launch import run

CHUNK = 10
BAD = ("DIFFERENT", "crashed", "silent")


def outcomes(first, programs, timeout_s=2.0):
    """Yield the seed of each program, how it ended, and what was said."""
    seed, end = first, first + programs
    while seed < end:
        ranks = 2 + seed // CHUNK % 3
        number = min(CHUNK - seed % CHUNK, end - seed)
        arguments = ["--seed", seed, "--count", number, "--timeout", timeout_s]
        result = run(ranks, arguments, timeout=60 + 20 * number, module="tests.process.mismatching")
        begun = dict(re.findall(r"^(\d+) begins (.*)$", result.out, re.MULTILINE))
        ended = re.findall(r"^(\d+) ends (\w+) (.*)$", result.out, re.MULTILINE)
        for number, how, text in ended:
            yield int(number), how, text
        last = max(map(int, begun))
        if str(last) not in [number for number, *_ in ended]:
            named = re.search(r"hpcavg: hung: .*; (missing: .*|waiting in other calls: .*)", result.err)
            how = "named" if named else "crashed"
            yield last, how, f"{begun[str(last)]}: {named[0] if named else result.err[-2000:]}"
        seed = last + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=200)
    options = parser.parse_args()
    counted = Counter()
    for seed, how, text in outcomes(options.seed, options.programs):
        counted[how] += 1
        print(seed, how, text, flush=True)
    print(dict(counted))
    sys.exit(any(counted[how] for how in BAD))


if __name__ == "__main__":
    main()
