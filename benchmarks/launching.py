"""How a benchmark that is no MPI program itself starts ranks, and ends them with all they have started."""

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
    """Return the mpirun that the variable ``MPIRUN`` names, else the one beside this interpreter, else the PATH's."""
    beside = Path(sys.executable).parent / "mpirun"
    return os.environ.get("MPIRUN") or (str(beside) if beside.exists() else "mpirun")


def job_ranks(variables: Mapping[str, str]) -> int | None:
    """Return how many tasks the Slurm or LSF job has whose environment this is; None outside of one."""
    if "SLURM_JOB_ID" in variables:
        if variables.get("SLURM_NTASKS", "").isdecimal():
            return int(variables["SLURM_NTASKS"])
        # 8(x2),4 is two nodes of 8 tasks and one of 4
        counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", variables.get("SLURM_TASKS_PER_NODE", "1"))
        return sum(int(tasks) * int(nodes or 1) for tasks, nodes in counts)
    if "LSB_JOBID" in variables:
        return int(variables.get("LSB_DJOB_NUMPROC", "1"))
    return None


def default_ranks() -> int:
    """Return the number of tasks of the job that this process is in, 4 outside of one."""
    return job_ranks(os.environ) or _WORKSTATION_RANKS


def default_launcher() -> str:
    """Return mpirun as a template: inside a job it is bare, elsewhere ranks may outnumber cores.

    The variable ``MPIRUN_FLAGS`` takes the place of the flags.
    """
    flags = os.environ.get("MPIRUN_FLAGS", _WORKSTATION_FLAGS if job_ranks(os.environ) is None else "")
    return f"{shlex.quote(mpirun())} -np {RANKS} {flags}".strip()


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take ``--launcher``."""
    text = f"how to start ranks, {RANKS} for their number [{default_launcher()}]".replace("%", "%%")
    parser.add_argument("--launcher", default=default_launcher(), metavar="TEMPLATE", help=text)


def launch(template: str, ranks: int, program: list[str]) -> list[str]:
    """Return the command that starts `program` on `ranks` ranks; raise `InputError` where `template` cannot.

    A template without `RANKS` has their number in it already.
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
    """Return this process's environment with what Open MPI needs; what the user has set counts."""
    # The windows of UCX warn and are not used; to root it must be said twice, to both halves of Open MPI.
    usual = {"OMP_NUM_THREADS": "1", "OMPI_MCA_osc": "^ucx"}
    if os.geteuid() == 0:
        usual |= {f"{half}_ALLOW_RUN_AS_ROOT{more}": "1" for half in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    return {**usual, **os.environ}


def descendants(root: int) -> list[int]:
    """Return the processes of this node that `root` has started, and those that they have, and so on."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def end(process: subprocess.Popen[Any], grace_s: float = 10.0) -> int:
    """End `process`, the first of its session, and all it has started; return its status.

    SIGTERM lets the launcher end the ranks of other nodes; who is still there after `grace_s` seconds gets SIGKILL.
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
