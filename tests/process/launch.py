"""Runs hpcavg as a user would, in an mpirun of its own with a deadline."""

import atexit
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.launching import mpirun
from hpcavg.results.view import read_view
from tests.process import warm

# An mpirun that is killed leaves a folder named after its process, over which the next one of that number stumbles
# ("The PMIx server's listener thread failed to start"). So each has a place of its own for it.
SESSIONS = tempfile.TemporaryDirectory(prefix="sessions-")

FLAGS = ["--oversubscribe", "--bind-to", "none"]
ULFM = ["--with-ft", "ulfm"]

# The launcher's messages stand between lines of dashes. It may say "Error" of its own files.
FRAMED = re.compile(r"^-{60,}\n.*?^-{60,}\n", re.DOTALL | re.MULTILINE)


@dataclass
class Result:
    status: int
    out: str
    err: str
    wall_s: float

    @property
    def own_lines(self):
        """What hpcavg and Python wrote to standard error, without the launcher's account of how ranks ended."""
        lines = FRAMED.sub("", self.err).splitlines()
        return [line for line in lines if "hpcavg" in line or "Error" in line or "Traceback" in line]


def environment(**changes):
    root = {f"{part}_ALLOW_RUN_AS_ROOT{more}": "1" for part in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_COMM", "PMIX", "SLURM"))}
    session = {"PRTE_MCA_prte_tmpdir_base": tempfile.mkdtemp(dir=SESSIONS.name)}
    return {**kept, **root, **session, "OMPI_MCA_osc": "^ucx", "OMP_NUM_THREADS": "1", **changes}


@functools.cache
def warm_server():
    server = warm.Server(Path(SESSIONS.name) / "warm", environment())
    atexit.register(server.close)
    return server


def start(ranks, arguments, module="hpcavg", flags=(), is_warm=False, **changes):
    """Start `module` on `ranks` ranks (0: without mpirun).

    is_warm : the ranks may be forked from a process that has imported torch; `tests.process.warm` says when that is
    honest.
    """
    arguments = [*map(str, arguments)]
    command = [sys.executable, "-m", module, *arguments]
    if is_warm:
        command = warm_server().command(module, arguments)
        changes = {**changes, **warm_server().variables}
    if ranks:
        command = [mpirun(), "-np", str(ranks), *FLAGS, *flags, *command]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
        start_new_session=True,
    )


def run(ranks, arguments, timeout=60, module="hpcavg", is_warm=True, **options):
    """Run `module` on `ranks` ranks; fail if it runs for `timeout` seconds. Options are those of `start`."""
    started = time.monotonic()
    process = start(ranks, arguments, module, is_warm=is_warm, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    # Open MPI's own messages end with a NUL, which stands before whatever a rank says next.
    return Result(process.returncode, out.replace("\0", ""), err.replace("\0", ""), time.monotonic() - started)


def trained(folder, ranks, arguments):
    """Train to the end; return the summary and the result."""
    result = run(ranks, [*arguments, "--output", folder])
    assert result.status == 0, result.err
    return json.loads((folder / "summary.json").read_text()), result


def wait_for(condition, process=None, seconds=60):
    """Wait until `condition()` holds; fail if `process` ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_recorded(folder):
    """Return the steps taken by each rank, as far as they are in the files."""
    try:
        return read_view(folder / "metrics", "step")["step"].max(axis=1)
    except (OSError, RuntimeError, ValueError):  # a file is only being made
        return [0]


def pid_of_rank(folder, rank):
    """Return the process id of a rank of the run that writes to `folder`."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # not a process, or one that has just ended
            continue
        if str(folder).encode() in words and f"OMPI_COMM_WORLD_RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no rank {rank} of {folder}")
