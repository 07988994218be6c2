"""What is done, by ``--on-failure``, about ranks that hang, are sick or hold what they should not."""

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
from hpcavg.utils.streams import tell

# Exit statuses beside 0 and that of bad input: a rank failed; all went well but for the record of it; start again with
# --resume (EX_TEMPFAIL of sysexits.h).
FAILED, RECORDS_LOST, REQUEUE = 1, 3, 75
# How long a rank waits for the one that ends the job, before it does so itself.
_LAST_WAIT_S = 10.0


def build_topology(config: Config) -> Topology:
    """Return the topology, one that survives deaths where that is asked for. Collective."""
    comm = all_ranks(config)
    if config.on_failure == "shrink":
        return SurvivingTopology(comm, group_size=config.group_size)
    topology = Topology(comm, group_size=config.group_size, num_servers=config.servers)
    install_abort_hook(_status(config))
    return topology


def all_ranks(config: Config) -> MPI.Intracomm:
    """Return the communicator of all ranks; one rank that is meant to be alone, whoever started it, says so by it."""
    return MPI.COMM_SELF if config.expect_ranks == 1 else MPI.COMM_WORLD


def part_with(error: CorruptionError, topology: Topology) -> None:
    """End this rank if it is an odd one and the others can go on without it; raise `error` where they cannot."""
    if not topology.survives or not error.ranks:
        raise error
    if topology.rank in error.ranks:
        tell(f"hpcavg: error: {error}; this rank leaves")
        os.kill(os.getpid(), signal.SIGKILL)


def end_job(
    error: SickLearnersError | CorruptionError, config: Config, topology: Topology, last_checkpoint: object
) -> NoReturn:
    """Say, once, what is wrong and which checkpoint is the last good one; end the job."""
    sick = error.learners if isinstance(error, SickLearnersError) else []
    if topology.rank == min(sick, default=0):
        kept = "there is no checkpoint" if last_checkpoint is None else f"last good checkpoint: {last_checkpoint}"
        tell(f"hpcavg: error: {error}; {kept}")
    else:
        time.sleep(_LAST_WAIT_S)
    abort(config)
    raise error


def abort(config: Config) -> None:
    """End the job at once."""
    MPI.COMM_WORLD.Abort(_status(config))


def give_up(text: str) -> None:
    """Say why and end the job at once, not to be started again: another writes where this one did."""
    tell(f"hpcavg: error: {text}")
    MPI.COMM_WORLD.Abort(FAILED)


def _status(config: Config) -> int:
    return REQUEUE if config.on_failure == "restart" else FAILED
