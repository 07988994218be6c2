"""Start ranks from a program that is not under MPI, and end them with all processes that they have started."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcavg.errors import InputError

RANKS = "{ranks}"
_WORKSTATION_RANKS = 4
_WORKSTATION_FLAGS = "--oversubscribe --bind-to none"


def mpirun() -> str:
    """Return the mpirun in the variable ``MPIRUN``, else the one beside this interpreter, else that on the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return os.environ.get("MPIRUN") or (str(beside) if beside.exists() else "mpirun")


def job_ranks(variables: Mapping[str, str]) -> int | None:
    """Return how many tasks a Slurm or LSF job has, from its environment variables; None outside of a job."""
    if "SLURM_JOB_ID" in variables:
        if variables.get("SLURM_NTASKS", "").isdecimal():
            return int(variables["SLURM_NTASKS"])
        # 8(x2),4 means two nodes of 8 tasks and one of 4.
        counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", variables.get("SLURM_TASKS_PER_NODE", "1"))
        return sum(int(tasks) * int(nodes or 1) for tasks, nodes in counts)
    if "LSB_JOBID" in variables:
        return int(variables.get("LSB_DJOB_NUMPROC", "1"))
    return None


def default_ranks() -> int:
    """Return the number of tasks of this job; 4 outside of a job."""
    return job_ranks(os.environ) or _WORKSTATION_RANKS


def default_launcher() -> str:
    """Return the command mpirun as a template. Outside of a job its flags allow more ranks than cores.

    The variable ``MPIRUN_FLAGS`` replaces the flags.
    """
    flags = os.environ.get("MPIRUN_FLAGS", _WORKSTATION_FLAGS if job_ranks(os.environ) is None else "")
    return f"{shlex.quote(mpirun())} -np {RANKS} {flags}".strip()


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--launcher`` to `parser`."""
    text = f"how to start ranks, {RANKS} for their number [{default_launcher()}]".replace("%", "%%")
    parser.add_argument("--launcher", default=default_launcher(), metavar="TEMPLATE", help=text)


def launch(template: str, ranks: int, program: list[str]) -> list[str]:
    """Return the command that starts `program` on a number of ranks.

    Parameters
    ----------
    template : str
        The launcher and its options. `RANKS` in it stands for the number of ranks.
    ranks : int
        The number of ranks.
    program : list of str
        What every rank runs.

    Raises
    ------
    InputError
        The template is not a command, or the command does not exist.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise InputError("launcher", template, f"a command ({error})") from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(
            "launcher", template, f"a command that exists: there is no {''.join(words[:1]) or 'word in it'}"
        )
    return [*(word.replace(RANKS, str(ranks)) for word in words), *program]


def environment() -> dict[str, str]:
    """Return this process's environment and what Open MPI needs. The user's own variables win."""
    # UCX's windows warn and are not used. Open MPI and PRRTE each ask root to confirm by two variables.
    usual = {"OMP_NUM_THREADS": "1", "OMPI_MCA_osc": "^ucx"}
    if os.geteuid() == 0:
        usual |= {f"{half}_ALLOW_RUN_AS_ROOT{more}": "1" for half in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    return {**usual, **os.environ}


def descendants(root: int) -> list[int]:
    """Return all descendants of the process `root` on this node."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has just ended
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def end(process: subprocess.Popen[Any], grace_s: float = 10.0) -> int:
    """End `process`, the leader of its session, and all processes that it has started; return its status.

    SIGTERM lets the launcher end the ranks on other nodes. Processes that remain after `grace_s` seconds get SIGKILL.
    """
    running = descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and (process.poll() is None or any(map(_is_alive, running))):
        time.sleep(0.05)
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    return process.wait()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
