"""What ``python -m hpcavg`` does: dispatch, and one message per error. `ExitStatus` has the exit statuses.

Training goes on if its output cannot be written: the output is no record. A command that only prints fails then.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpcavg.cli import parsers
from hpcavg.config.options import Config
from hpcavg.distributed import launcher_variables
from hpcavg.distributed.job_environment import (
    check_ranks,
    check_sizes,
    launcher_rank,
    require_pmix_server,
)
from hpcavg.distributed.signals import remember_early_signals
from hpcavg.errors import InputError
from hpcavg.utils import streams
from hpcavg.utils.exit_status import ExitStatus

if TYPE_CHECKING:
    from mpi4py import MPI

# By how much ranks that were started together may be apart when they have read their options.
_LONE_S = 5.0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status."""
    command, rest = parsers.split_command(sys.argv[1:] if arguments is None else arguments)
    only_prints = command in ("info", "report", "job") or parsers.wants_help(rest)
    streams.guard(only_prints)
    if command not in ("report", "job", "data") and not parsers.wants_help(rest):
        try:
            status = _with_mpi(command, rest)
        except SystemExit as error:  # a rank that left quietly would leave the others waiting
            raise RuntimeError(f"sys.exit({error.code}) was called during training") from error
        except KeyboardInterrupt:  # while starting; a launcher ends the other ranks when one leaves so
            streams.print_error("hpcavg: interrupted")
            os._exit(ExitStatus.INTERRUPTED)
        except InputError as error:  # of what MPI must not be started with
            _print_error(error)
            sys.exit(ExitStatus.BAD_INPUT)
        _leave(streams.final_status(status, only_prints))
    try:
        status = _without_mpi(command, rest)
    except SystemExit as error:  # argparse has printed its help
        status = int(error.code or 0)
    sys.exit(streams.final_status(status, only_prints))


def _without_mpi(command: str, arguments: list[str]) -> int:
    if command == "data" and not parsers.wants_help(arguments):
        return _data(arguments)
    if launcher_rank() != 0:  # under mpirun one text is enough
        return 0
    try:
        if command == "report":
            options = parsers.report_parser().parse_args(arguments)
            from hpcavg.results import report

            report.main(options.folders, options.output)
        elif command == "job":
            parsers.write_job(arguments)
        elif command == "paper":
            _list_experiments(arguments)
        elif command == "data":
            parsers.data_parser().parse_args(arguments)
        elif (text := parsers.listing(arguments)) is not None:
            print(text)
        else:
            parsers.train_parser().parse_args(arguments)
    except InputError as error:
        _print_error(error)
        return ExitStatus.BAD_INPUT
    return 0


def _list_experiments(arguments: list[str]) -> None:
    if "--list" in arguments:
        from hpcavg.experiments import registry

        print(registry.describe())
    else:
        parsers.paper_parser().parse_args(arguments)


def _data(arguments: list[str]) -> int:
    """Do what ``data`` asks for; return the exit status, the same on every rank."""
    try:
        options = parsers.parse_data(arguments)
        from hpcavg.cli import data_command

        data_command.run(options, _connect_all, launcher_rank())
    except InputError as error:
        _print_once(error)
        return ExitStatus.BAD_INPUT
    except KeyboardInterrupt:
        streams.print_error("hpcavg: interrupted; start the same command again")
        return ExitStatus.INTERRUPTED
    return 0


def _connect() -> MPI.Intracomm:
    """Start MPI and return the communicator of all ranks; from now on a rank that fails ends the job."""
    require_pmix_server(os.environ)
    from mpi4py import MPI

    from hpcavg.distributed.abort import install_abort_hook

    install_abort_hook()
    return MPI.COMM_WORLD


def _connect_all() -> MPI.Intracomm:
    """Do as `_connect` does, where MPI sees all ranks that were started."""
    world = _connect()
    check_ranks(world.Get_size(), None)
    return world


def _with_mpi(command: str, arguments: list[str]) -> int:
    """Parse on rank 0, do what `command` says on all; return the exit status, the same on every rank.

    Any exception but an `InputError` before the training starts ends the whole job, by the abort hook.
    """
    # Collecting garbage while thousands of modules are created costs a fifth of the start-up and finds nothing.
    gc.disable()
    if command == "train":
        remember_early_signals()
    world = _connect()
    config: Any = None
    error = None
    if world.Get_rank() == 0:
        try:
            if command == "paper":
                from hpcavg.cli import paper_command

                config = parsers.parse_paper(arguments)
                check_ranks(world.Get_size(), None)
                paper_command.check(config, world.Get_size())
            else:
                config = parsers.parse_train(arguments)
                _check_early(config, world.Get_size())
        except InputError as raised:
            error = raised
    config, error = world.bcast((config, error), root=0)
    try:
        if error is not None:
            raise error
        if command == "info":
            from hpcavg.cli import info

            info.main(config)
            return 0
        if command == "paper":
            from hpcavg.cli import paper_command

            gc.enable()
            paper_command.run(config, world)
            return 0
        from hpcavg.training.trainer import Trainer

        gc.enable()
        gc.freeze()
        trainer = Trainer(config)
    except InputError as raised:  # every rank has the same
        if world.Get_rank() == 0:
            _print_once(raised)
        return ExitStatus.BAD_INPUT
    return trainer.train()


def _check_early(config: Config, num_ranks: int) -> None:
    """Raise `InputError` for what can be known before every rank has spent seconds on importing torch."""
    from hpcavg.results import run_folder

    check_ranks(num_ranks, config.run.expect_ranks)
    servers, per_rank = config.servers_of(num_ranks), config.learners_of_rank(num_ranks)
    check_sizes(num_ranks, config.roles.group_size, servers, per_rank)
    if config.run.output is not None:
        run_folder.check(Path(config.run.output), may_be_run=config.checkpoints.resume is not None)


def _print_once(error: InputError) -> None:
    """Print `error` on one of several ranks that each believe to be alone, and so are all rank 0.

    The others stay until it has: a launcher may end all ranks as soon as one has left, torchrun within 0.1 s.
    """
    if launcher_variables.reports_lone_ranks(os.environ):
        _print_error(error)
    else:
        time.sleep(_LONE_S)


def _print_error(error: InputError) -> None:
    print(f"hpcavg: error: {error.as_option()}", file=sys.stderr, flush=True)


def _leave(status: int) -> NoReturn:
    """End the process at once after an orderly shutdown: taking torch's modules apart one by one costs 0.5 s a rank."""
    from hpcavg.distributed import shrinking

    atexit._run_exitfuncs()
    shrinking.finalize()
    streams.flush()
    os._exit(status)
