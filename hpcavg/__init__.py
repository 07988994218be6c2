"""hpcavg: training neural networks by model averaging over MPI.

The names below are imported at their first use: ``python -m hpcavg --help`` loads neither torch nor MPI.

Examples
--------
Every process is one learner. ``mpirun -np 4 python script.py`` starts four; here there is one.

>>> import torch
>>> from hpcavg import Averager, Topology, algorithms
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> topology = Topology()
>>> averager = Averager(model, optimizer, algorithms.k_avg(k=8), topology)
>>> for _ in range(16):
...     optimizer.zero_grad()
...     model(torch.ones(1, 4)).sum().backward()
...     averager.step()
>>> averager.finish()
>>> averager.totals.global_averages
2
>>> topology.free()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hpcavg.distributed import child_processes

if TYPE_CHECKING:
    from hpcavg import algorithms
    from hpcavg.averaging.averager import Averager
    from hpcavg.averaging.flat_buffer import FlatBuffer
    from hpcavg.averaging.stacked import stack
    from hpcavg.config.sections.averaging import AveragingOptions
    from hpcavg.distributed.topology import Topology
    from hpcavg.errors import InputError

__version__ = "0.1.0"

_MODULES = {
    "Averager": "hpcavg.averaging.averager",
    "AveragingOptions": "hpcavg.config.sections.averaging",
    "FlatBuffer": "hpcavg.averaging.flat_buffer",
    "InputError": "hpcavg.errors",
    "Topology": "hpcavg.distributed.topology",
    "algorithms": "hpcavg.algorithms",
    "stack": "hpcavg.averaging.stacked",
}
__all__ = ["Averager", "AveragingOptions", "FlatBuffer", "InputError", "Topology", "algorithms", "stack"]

child_processes.guard()


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'hpcavg' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if name == "algorithms" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
