"""Emulate a cluster on one Linux machine: nodes with names, addresses and cables of a limited rate.

    python -m benchmarks.cluster --nodes 2 --slots 2 --rate 1gbit -- python -m benchmarks.mean
    python -m benchmarks.cluster --slots 3,1 --np 4 -- python -m hpcavg --algorithm hier-avg
    python -m benchmarks.cluster --plain -- jobs/restart.sh mpirun -host node0:2,node1:2 python -m hpcavg ...

Starts the command under mpirun on node0, so MPI sees separate hosts, and exits with its status. With `--plain` the
command starts mpirun itself. A node has its own network interface, host name and /dev/shm; cores, memory and all other
files are the machine's. A cable from every node to a switch carries `--rate` in each direction. Needs Linux, root,
iproute2 and util-linux.

Nothing has to be cleaned up. All processes of the cluster are in a new process namespace. Its process 1 dies with the
process that started it, in any case. The kernel then kills every process of the cluster and removes namespaces, cables
and files in memory with the last of them.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from benchmarks import launching
from hpcavg.errors import InputError, UsageError, require_integer

TOOLS = ("ip", "tc", "unshare", "setpriv", "mount")
# After SIGINT or SIGTERM mpirun has so long to end its ranks before the kernel does.
GRACE_S = 10
# A cable may send this much at once. With less, timers would limit the rate; with more, short messages feel no limit.
_BURST_S = 0.002
_MIN_BURST_BYTES = 2**18

# A file system in memory that only this cluster sees, mounted over the folder where iproute2 keeps its names.
_FOLDER = "/run/netns"
ON_NODE = f"{_FOLDER}/on-node"
# Like ssh: the first word is a host, and a shell there runs the others, joined. A node has its own names and memory.
# TCP uses reno, which all kernels have: BBR, the default of some, takes much of the cores to pace every packet.
_ON_NODE_SCRIPT = """#!/bin/sh
node=$1
shift
exec ip netns exec $node unshare --uts --ipc sh -c "
echo $node > /proc/sys/kernel/hostname
echo reno > /proc/sys/net/ipv4/tcp_congestion_control
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
$*"
"""


class ClusterError(RuntimeError):
    """A cluster cannot be emulated on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Cluster:
    """The cluster of one command. It exists only while the command runs.

    Parameters
    ----------
    slots : tuple of int
        Ranks of every node, node0 first.
    rate : str, optional
        Of every cable in each direction, in the form of tc: ``"1gbit"``, ``"200mbit"``. None: no limit.
    delay : str, optional
        From any node to any other: ``"1ms"``, ``"50us"``. None: no delay.
    mtu : int
        The largest packet in bytes; 9000 for jumbo frames.
    yields : bool
        Ranks that wait inside MPI yield their core. Open MPI does so only if a node has more ranks than cores, but here
        all nodes share the cores.

    Raises
    ------
    InputError
        A value is not possible.
    """

    slots: tuple[int, ...] = (2, 2)
    rate: str | None = None
    delay: str | None = None
    mtu: int = 1500
    yields: bool = False

    def __post_init__(self) -> None:
        require_integer("nodes", len(self.slots), 1, 250)
        for slots in self.slots:
            require_integer("slots", slots, 1)
        require_integer("mtu", self.mtu, 576, 65535)
        if self.rate is not None and not self.bytes_per_s > 0:
            raise InputError("rate", self.rate, "a positive number with bit, kbit, mbit or gbit, such as 1gbit")
        if self.delay is not None and not re.fullmatch(r"\d+(\.\d+)?(us|ms|s)", self.delay):
            raise InputError("delay", self.delay, "a number with us, ms or s, such as 1ms")

    @property
    def bytes_per_s(self) -> float:
        """The bytes per second of a cable in one direction, headers included; infinite without a limit."""
        if self.rate is None:
            return math.inf
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", self.rate)
        return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8 if found else 0.0

    @property
    def burst_bytes(self) -> int:
        """The bytes that an idle cable takes at once."""
        return max(_MIN_BURST_BYTES, round(self.bytes_per_s * _BURST_S))

    def command_line(
        self,
        program: Sequence[str],
        num_ranks: int | None = None,
        mpirun_flags: Sequence[str] = (),
        is_plain: bool = False,
    ) -> list[str]:
        """Return the command that makes the cluster and runs `program`; it needs the variables of `environment`.

        Parameters
        ----------
        program : sequence of str
            The command. A first word ``python`` means this interpreter.
        num_ranks : int, optional
            The number of ranks. Default: all slots.
        mpirun_flags : sequence of str
            More options of mpirun.
        is_plain : bool
            Run the program once on node0, without mpirun.
        """
        require_integer("np", sum(self.slots) if num_ranks is None else num_ranks, 1, sum(self.slots))
        if program[0] == "python":
            program = [sys.executable, *program[1:]]
        hosts = ",".join(f"node{node}:{slots}" for node, slots in enumerate(self.slots))
        # There may be more slots than cores. Ranks are not bound, or those of all nodes would share the first cores.
        flags = ["-host", hosts, "--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none"]
        mpirun = [_mpirun(), "-np", str(num_ranks or sum(self.slots)), *flags, *mpirun_flags]
        launched = [*program] if is_plain else [*mpirun, *program]
        # The shell stays as process 1: it reaps children, and the namespace lives as long as it does.
        script = f"""
            failed=$({{ {" && ".join(self._setup())}; }} 2>&1) || {{
                printf 'benchmarks.cluster: error: %s\\n' "$failed" >&2
                exit 2
            }}
            {ON_NODE} node0 "$1"
            exit $?
        """
        namespaces = ["--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--net"]
        script_words = ["sh", "-c", script, "cluster", f"exec {shlex.join(launched)}"]
        return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, *script_words]

    def _setup(self) -> list[str]:
        """Return the shell commands that make the switch, the nodes and the cables, in the switch's namespace."""
        hosts = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{n + 1} node{n}\n" for n in range(len(self.slots)))
        lines = [
            f"mkdir -p {_FOLDER}",
            f"mount -t tmpfs tmpfs {_FOLDER}",
            f"printf %s {shlex.quote(hosts)} > {_FOLDER}/hosts",
            f"mount --bind {_FOLDER}/hosts /etc/hosts",
            f"printf %s {shlex.quote(_ON_NODE_SCRIPT)} > {ON_NODE}",
            f"chmod +x {ON_NODE}",
            "ip link add switch type bridge",
            "ip link set switch up",
        ]
        for index in range(len(self.slots)):
            node = f"node{index}"
            lines += [
                f"ip netns add {node}",
                f"ip link add {node} mtu {self.mtu} type veth peer name eth0 mtu {self.mtu} netns {node}",
                f"ip link set {node} master switch up",
                f"ip -n {node} addr add 10.77.0.{index + 1}/24 dev eth0",
                f"ip -n {node} link set eth0 up",
                f"ip -n {node} link set lo up",
                *self._limits(node),
            ]
        return lines

    def _limits(self, node: str) -> list[str]:
        """Return the commands that limit a node's cable: outward at its end, inward and delayed at the switch's end."""
        lines, parent = [], "root"
        if self.delay is not None:
            refusal = f"--delay {self.delay}: must be left out, this kernel has no netem (module sch_netem)"
            delayed = f"tc qdisc add dev {node} root handle 1: netem delay {self.delay} limit 100000 2> /dev/null"
            lines.append(f"{{ {delayed} || {{ echo '{refusal}'; false; }}; }}")
            parent = "parent 1:1"
        if self.rate is not None:
            shaped = f"tbf rate {self.rate} burst {self.burst_bytes} latency 300ms"
            lines.append(f"tc -n {node} qdisc add dev eth0 root {shaped}")
            # Between two nodes the sender's limit suffices; the timers of each limit take processor time.
            if len(self.slots) > 2:
                lines.append(f"tc qdisc add dev {node} {parent} {shaped}")
        return lines

    def start(
        self,
        program: Sequence[str],
        num_ranks: int | None = None,
        mpirun_flags: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        is_plain: bool = False,
        **popen: Any,
    ) -> subprocess.Popen[Any]:
        """Start `program` on the cluster. To end the cluster, kill the returned process.

        The calling thread must live as long as the cluster.

        Parameters
        ----------
        program : sequence of str
            As for `command_line`.
        num_ranks : int, optional
            As for `command_line`.
        mpirun_flags : sequence of str
            As for `command_line`.
        variables : mapping, optional
            More environment variables for every rank.
        is_plain : bool
            As for `command_line`.
        **popen
            More arguments of `subprocess.Popen`.

        Raises
        ------
        ClusterError
            A program or a right is missing.
        """
        check_requirements()
        command = self.command_line(program, num_ranks, mpirun_flags, is_plain)
        variables = {**environment(self.yields), **(variables or {})}
        # In its own process group: Ctrl-C in a terminal goes only to the caller, which decides.
        return subprocess.Popen(command, env=variables, start_new_session=True, **popen)

    def run(
        self, program: Sequence[str], timeout_s: float, num_ranks: int | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `program` on the cluster and return its status and output.

        Parameters
        ----------
        program : sequence of str
            As for `command_line`.
        timeout_s : float
            The seconds that it may take.
        num_ranks : int, optional
            As for `command_line`.
        **options
            More arguments of `start`.

        Raises
        ------
        subprocess.TimeoutExpired
            It takes longer. The exception has the output so far.
        """
        options = {"stdin": subprocess.DEVNULL, **options, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.start(program, num_ranks, text=True, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except BaseException as error:
                process.kill()
                if isinstance(error, subprocess.TimeoutExpired):
                    error.stdout, error.stderr = process.communicate()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def environment(yields: bool) -> dict[str, str]:
    """Return this process's environment and what Open MPI needs on the cluster. The user's own variables win."""
    outside = ("OMPI_COMM", "PMIX", "SLURM")
    around = {key: value for key, value in launching.environment().items() if not key.startswith(outside)}
    usual = {
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,sm,self",
        **({"OMPI_MCA_mpi_yield_when_idle": "1"} if yields else {}),
    }
    needed = {
        "PRTE_MCA_plm_ssh_agent": ON_NODE,
        "PRTE_MCA_prte_tmpdir_base": "/dev/shm",  # the node's own; all clusters share /tmp
    }
    return {**usual, **around, **needed}


def check_requirements() -> None:
    """Raise `ClusterError` unless this process may make namespaces and finds the programs that it needs."""
    if os.geteuid() != 0:
        raise ClusterError("needs root: it makes network namespaces")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ClusterError(f"needs {', '.join(missing)} on the PATH: the packages iproute2 and util-linux")
    probe = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True)
    if tried.returncode:
        raise ClusterError(f"needs the right to make namespaces (CAP_SYS_ADMIN): {tried.stderr.strip()}")


def _mpirun() -> str:
    name = launching.mpirun()
    path = shutil.which(name)
    if path is None:
        raise ClusterError(f"needs mpirun, and there is no {name}: set MPIRUN")
    return path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: Sequence[str] | None) -> tuple[Cluster, argparse.Namespace]:
    """Return the cluster and all options of a command line; raise `InputError` for bad input."""
    parser = _Parser(
        prog="python -m benchmarks.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="number of nodes [as many as --slots lists, else 2]")
    parser.add_argument("--slots", default="2", metavar="S[,S...]", help="ranks of every node, or node by node [2]")
    parser.add_argument("--rate", help="rate of every cable in each direction, such as 1gbit [no limit]")
    parser.add_argument("--delay", help="delay from node to node, such as 1ms; needs the kernel's netem [none]")
    parser.add_argument("--mtu", type=int, default=1500, help="largest packet in bytes [1500]")
    parser.add_argument("--yield", action="store_true", dest="yields", help="ranks that wait in MPI yield their core")
    parser.add_argument("--np", type=int, metavar="P", help="number of ranks [all slots]")
    parser.add_argument("--mpirun-flags", default="", metavar="'FLAGS'", help='more of mpirun, "--with-ft ulfm" [none]')
    parser.add_argument("--plain", action="store_true", help="run the command on node0, once; it starts mpirun itself")
    parser.add_argument("program", nargs="+", metavar="-- COMMAND", help="what every rank runs, or node0")
    options = parser.parse_args(arguments)
    words = options.slots.split(",")
    num_nodes = (len(words) if len(words) > 1 else 2) if options.nodes is None else options.nodes
    if not all(word.isdecimal() for word in words) or len(words) not in (1, num_nodes):
        raise InputError("slots", options.slots, f"one number or {num_nodes}, one for every node, such as 3,1")
    slots = tuple(int(word) for word in words) * (num_nodes if len(words) == 1 else 1)
    return Cluster(slots, options.rate, options.delay, options.mtu, options.yields), options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the command's exit status, 2 for bad input, or 128 + N after signal N."""
    try:
        cluster, options = parse(arguments)
        flags = shlex.split(options.mpirun_flags)
        process = cluster.start(options.program, options.np, flags, is_plain=options.plain)
    except InputError as error:
        return _refuse(error.as_option())
    except ClusterError as error:
        return _refuse(str(error))
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if received:  # a second Ctrl-C does not wait
            process.kill()
        received.append(number)
        os.killpg(process.pid, signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        signal.alarm(GRACE_S)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, lambda number, frame: process.kill())
    status = process.wait()
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def _refuse(reason: str) -> int:
    print(f"benchmarks.cluster: error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
