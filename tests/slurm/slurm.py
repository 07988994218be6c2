"""A Slurm of several nodes on one machine, for tests: `make test-slurm`.

It is Debian's, and runs on node0 of the cluster that `benchmarks.cluster` emulates, whose nodes are Slurm's. Ports,
processes and mounts of the cluster and of the rest of the machine are hidden from each other. Configuration, state,
logs and sockets are in a file system in memory of its own. However the cluster ends, the kernel ends the daemons then.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.cluster import ON_NODE

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
START_S, STOP_S, COMMAND_S = 60, 20, 60
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")

# Nodes claim more cores than there are. A requeued job waits for `cred_expire` seconds: 5, the least, in place of 120.
# MinJobAge: for so long jobs that have ended stay known. TmpFS: PMIx keeps files there that nodes must not share.
_CONFIGURATION = """
ClusterName=hpcavg
SlurmctldHost=node0
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS=/dev/shm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
MailProg=/bin/true
MinJobAge=86400
ReturnToService=0
NodeName=node[0-{last}] CPUs={cpus} RealMemory=1000000
PartitionName=batch Nodes=ALL Default=YES State=UP
"""
_CGROUPS = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


class SlurmError(RuntimeError):
    """Slurm or one of its jobs has not done what it should; the message has the ends of the logs."""


class Slurm:
    """A Slurm that is there from the start of `with` to its end.

    nodes : how many of the emulated cluster's. cpus : that each of them claims to have. small_disk : a folder, the same
    on all nodes, that holds no more than 150 KiB.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4) -> None:
        self._nodes = [f"node{index}" for index in range(nodes)]
        self._cpus = cpus
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise SlurmError(f"needs {', '.join(missing)}: Debian's packages slurm-wlm, munge and libpmix2")
        if platform.node() != "node0" or not Path(ON_NODE).exists():
            raise SlurmError("runs on node0 of an emulated cluster alone: make test-slurm")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=Path(ON_NODE).parent))
        self.small_disk = self.folder / "small"
        self._environment = {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        try:
            self._configure()
            self._provide_pmix()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill the daemons and what is left of their jobs."""
        deadline = time.monotonic() + STOP_S
        while pids := self._processes():
            if time.monotonic() > deadline:
                raise SlurmError(f"processes {pids} do not end")
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for daemon in self._daemons:
            daemon.wait()
        subprocess.run(["umount", "--quiet", *self._pmix_folders(), self.small_disk])
        shutil.rmtree(self.folder)

    def submit(
        self,
        script: object,
        *arguments: object,
        options: Sequence[object] = (),
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Submit `script` with `arguments` from the repository's root; return the job's id.

        options : of sbatch, which come before what the script says. variables : added to the job's environment.
        """
        log = f"--output={self.folder}/%x-%j.log"
        return self.run("sbatch", "--parsable", log, *options, script, *arguments, variables=variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job: JobState, Reason, ExitCode, Restarts, ...; ``7_1`` is one of an array."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def wait(self, job: str, timeout_s: float) -> dict[str, str]:
        """Return what Slurm knows of a job once it has ended for good, which a requeued one has not."""
        deadline = time.monotonic() + timeout_s
        while (known := self.job(job))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                raise SlurmError(f"job {job}: {known} after {timeout_s} s\n{self.log(job)}\n{self.logs()}")
            time.sleep(0.3)
        return known

    def log(self, job: str) -> str:
        """Return what a job has written so far."""
        path = Path(self.job(job)["StdOut"])
        # Open MPI's own messages end with a NUL.
        return path.read_text(errors="replace").replace("\0", "") if path.exists() else ""

    def logs(self, num_lines: int = 30) -> str:
        """Return the ends of the daemons' logs."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log"))}
        ours = {name: text for name, text in texts.items() if name.startswith(("daemons", "munge", "slurm"))}
        return "\n".join("\n".join([f"== {name}", *text.splitlines()[-num_lines:]]) for name, text in ours.items())

    def run(self, *command: object, variables: Mapping[str, object] | None = None) -> str:
        """Run one of Slurm's commands and return what it prints."""
        words = [str(word) for word in command]
        added = {name: str(value) for name, value in (variables or {}).items()}
        environment = {**self._environment, **added}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COMMAND_S)
        if done.returncode:
            raise SlurmError(f"{' '.join(words)}: status {done.returncode}: {done.stderr}\n{self.logs()}")
        return done.stdout

    def _configure(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in self._nodes)):
            (self.folder / name).mkdir()
        self.small_disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", self.small_disk], check=True)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        values = {"folder": self.folder, "last": len(self._nodes) - 1, "cpus": self._cpus}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(**values))
        (self.folder / "cgroup.conf").write_text(_CGROUPS)

    def _provide_pmix(self) -> None:
        """Let `srun --mpi=pmix` find libpmix.so, which Debian has in no package, beside the library it is a link to.

        The plugin knows one path. A folder with the link is mounted there, which nobody outside the cluster sees.
        """
        for index, folder in enumerate(self._pmix_folders()):
            own = self.folder / f"pmix-{index}"
            shutil.copytree(folder, own, symlinks=True)
            (own / "libpmix.so").unlink(missing_ok=True)
            (own / "libpmix.so").symlink_to("libpmix.so.2")
            subprocess.run(["mount", "--bind", own, folder], check=True)

    def _pmix_folders(self) -> list[Path]:
        return list(Path("/usr/lib").glob("*/pmix2/lib"))

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}.{name}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", "--foreground", "--force", f"--socket={munge}.socket", *files)
        self._wait_for("munged's socket", Path(f"{munge}.socket").exists)
        self._spawn("slurmctld", "-D", "-c")
        for node in self._nodes:
            self._spawn(ON_NODE, node, f"exec slurmd -D -N {node}")
        self._wait_for("idle nodes", self._are_idle)

    def _spawn(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._daemons.append(subprocess.Popen(command, env=self._environment, start_new_session=True, **streams))

    def _are_idle(self) -> bool:
        with suppress(SlurmError):  # slurmctld does not answer yet
            return self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(self._nodes)
        return False

    def _wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                reason = f"{ended[0]} has ended" if ended else f"no {what} after {START_S} s"
                raise SlurmError(f"{reason}\n{self.logs()}")
            time.sleep(0.1)

    def _processes(self) -> list[int]:
        """Return all daemons and what they have started: processes with this configuration in their environment."""
        found = []
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found
