"""What ``--on-failure`` means for ranks that hang, have non-finite parameters or hold corrupt data."""

from __future__ import annotations

import os
import signal
import time
from typing import NoReturn

from mpi4py import MPI

from hpcavg.config.options import Config
from hpcavg.distributed.abort import install_abort_hook
from hpcavg.distributed.shrinking import SurvivingTopology
from hpcavg.distributed.topology import Topology
from hpcavg.errors import CorruptionError, SickLearnersError
from hpcavg.utils.exit_status import ExitStatus
from hpcavg.utils.streams import print_error

# How long a rank waits for the one that reports and ends the job, before it ends the job itself.
_LAST_WAIT_S = 10.0


def build_topology(config: Config, comm: MPI.Intracomm) -> Topology:
    """Return the topology of `comm`; with ``--on-failure shrink``, one that survives deaths. Collective."""
    per_rank, group_size = config.learners_of_rank(comm.Get_size()), config.roles.group_size
    if config.faults.on_failure == "shrink":
        return SurvivingTopology(comm, group_size=group_size, learners_per_rank=per_rank)
    servers = config.servers_of(comm.Get_size())
    topology = Topology(comm, group_size=group_size, num_servers=servers, learners_per_rank=per_rank)
    install_abort_hook(_status(config))
    return topology


def all_ranks(config: Config) -> MPI.Intracomm:
    """Return the communicator of all ranks; with ``--expect-ranks 1``, that of this rank alone, whoever started it."""
    return MPI.COMM_SELF if config.run.expect_ranks == 1 else MPI.COMM_WORLD


def leave_if_corrupt(error: CorruptionError, topology: Topology) -> None:
    """End this rank if it is one of the odd ones and the others can go on. Raise `error` if they cannot."""
    if not topology.survives or not error.ranks:
        raise error
    if topology.rank in error.ranks:
        print_error(f"hpcavg: error: {error}; this rank leaves")
        os.kill(os.getpid(), signal.SIGKILL)


def report_and_abort(
    error: SickLearnersError | CorruptionError, config: Config, topology: Topology, last_checkpoint: object
) -> NoReturn:
    """Print, on one rank, `error` and the last good checkpoint, and end the job.

    The lowest sick rank prints. If it does not end the job, because it is at another step, the others print.
    """
    sick = error.learners if isinstance(error, SickLearnersError) else []
    if topology.rank != min(sick, default=0) // topology.learners_per_rank:
        time.sleep(_LAST_WAIT_S)
    kept = "there is no checkpoint" if last_checkpoint is None else f"last good checkpoint: {last_checkpoint}"
    print_error(f"hpcavg: error: {error}; {kept}")
    abort(config)
    raise error


def abort(config: Config) -> None:
    """End the job at once, with the status that ``--on-failure`` asks for."""
    MPI.COMM_WORLD.Abort(_status(config))


def abort_after_takeover(text: str) -> None:
    """Print `text` and end the job at once. It must not be started again: another run has taken its folder over."""
    print_error(f"hpcavg: error: {text}")
    MPI.COMM_WORLD.Abort(ExitStatus.FAILED)


def _status(config: Config) -> ExitStatus:
    return ExitStatus.REQUEUE if config.faults.on_failure == "restart" else ExitStatus.FAILED
