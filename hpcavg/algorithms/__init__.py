"""The algorithms by name: each says WHEN x WHO x HOW. Light to import: no torch, no MPI.

Every constructor returns a `Rule` for `hpcavg.Averager`. It raises `InputError` for an argument that cannot be used.
`describe` returns the description of all algorithms, or of one.

A new algorithm is a constructor in a module of this package, registered by `hpcavg.algorithms.registry.algorithm`, and
a line below.
"""

from __future__ import annotations

# The order of these imports is the order of the algorithms in help and tables.
# isort: off
from hpcavg.algorithms.periodic import sgd as sgd
from hpcavg.algorithms.periodic import sync_sgd as sync_sgd
from hpcavg.algorithms.periodic import one_shot as one_shot
from hpcavg.algorithms.periodic import k_avg as k_avg
from hpcavg.algorithms.periodic import hier_avg as hier_avg
from hpcavg.algorithms.periodic import post_local_sgd as post_local_sgd
from hpcavg.algorithms.restarted import pr_sgd as pr_sgd
from hpcavg.algorithms.restarted import pr_sgd_time_varying as pr_sgd_time_varying
from hpcavg.algorithms.restarted import pr_sgd_hetero as pr_sgd_hetero
from hpcavg.algorithms.adaptive import lupa as lupa
from hpcavg.algorithms.adaptive import ada_lupa as ada_lupa
from hpcavg.algorithms.delayed import dasgd as dasgd
from hpcavg.algorithms.decentralized import gossip as gossip
from hpcavg.algorithms.outer import slowmo as slowmo
from hpcavg.algorithms.outer import diloco as diloco
from hpcavg.algorithms.server import downpour as downpour
from hpcavg.algorithms.server import eamsgd as eamsgd
# isort: on

from hpcavg.algorithms.registry import ALGORITHMS, all_option_names, build, describe, option_names

__all__ = ["ALGORITHMS", "all_option_names", "build", "describe", "option_names", *ALGORITHMS]
