"""``python -m hpcavg job``: job scripts for Slurm and LSF, from the templates in ``job_scripts``. Light to import."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcavg.config.section import UNSET, Section, argument, integer, option
from hpcavg.errors import InputError, reason
from hpcavg.utils.exit_status import ExitStatus

TEMPLATES = Path(__file__).parent / "job_scripts"
PURPOSES = {
    "train": "Trains once. Near the time limit it stops with a checkpoint, from which the same run can go on.",
    "sweep": "Trains once per line of sweep.txt, as an array of jobs.",
    "requeue": "Trains for longer than the time limit: near it, it stops with a checkpoint and queues itself again.",
    "benchmarks": "Runs the benchmark suite and writes a page of its figures.",
}
LAUNCHERS = {"slurm": ("mpirun", "srun"), "lsf": ("mpirun", "jsrun")}
CHANGE_ME = "CHANGE_ME"
# What the scripts need beside them; the user's own are left as they are.
_COMPANIONS = ("environment.sh", "restart.sh", "sweep.txt")
_TOKEN = re.compile(r"@([a-z_]+)@")


@dataclass(frozen=True)
class Job(Section):
    """A job for a scheduler.

    Parameters
    ----------
    scheduler : ``"slurm"`` or ``"lsf"``.
    kind : one of `PURPOSES`.
    launcher : one of the scheduler's `LAUNCHERS`.
    nodes : number of nodes.
    ranks_per_node : ranks on each node.
    cpus_per_rank : cores of each rank.
    gpus_per_node : GPUs of each node.
    time : time limit, as [D-]H:MM:SS.
    warning_minutes : how long before the time limit the scheduler asks ranks for a checkpoint.
    account : account, or LSF's project.
    partition : partition, or LSF's queue. None: the site's default.
    name : the job's name. None: hpcavg-KIND.
    array : lines of ``sweep.txt`` to run, such as 1-4.
    output : folder of the run, or of a sweep's runs. None: the job's own folder.
    resume : ``"auto"`` or ``"unset"``.

    Raises
    ------
    InputError
        If a value cannot be used.

    Examples
    --------
    >>> Job("slurm", nodes=4, time="0:30:00").minutes
    30
    """

    title = "job"

    scheduler: str = argument(dataclasses.MISSING)
    kind: str = option("train", ", ".join(PURPOSES))
    launcher: str = option("mpirun", "mpirun; srun for Slurm, jsrun for LSF")
    nodes: int = option(2, "nodes of the allocation", integer(1, 10**6))
    ranks_per_node: int = option(4, "ranks on each", integer(1, 10**6))
    cpus_per_rank: int = option(8, "cores of each rank", integer(1, 10**6))
    gpus_per_node: int = option(0, "GPUs of each node", integer(0, 10**6))
    time: str = option("1:00:00", "time limit, as [D-]H:MM:SS")
    warning_minutes: int = option(3, "minutes before it in which to write a checkpoint", integer(1))
    account: str = option(CHANGE_ME, "account, or LSF's project; the word unset leaves it out")
    partition: str | None = option(None, "partition, or LSF's queue; unset: the site's default")
    name: str | None = option(None, "the job's name; unset: hpcavg-KIND")
    array: str | None = option(None, "lines of sweep.txt to run, for --kind sweep; unset: 1-4")
    output: str | None = option(
        None, "folder of the run, or of a sweep's runs; unset: one for each job, in HPCAVG_RUNS of environment.sh"
    )
    resume: str = option(
        "auto",
        "auto: from the newest checkpoint there; unset: from the start, for algorithms with servers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = LAUNCHERS[self.scheduler]
        if self.launcher not in allowed:
            raise InputError("launcher", self.launcher, f"{' or '.join(allowed)} for {self.scheduler}")
        if self.launcher == "jsrun" and self.gpus_per_node % self.ranks_per_node:
            raise InputError("gpus_per_node", self.gpus_per_node, "a multiple of --ranks-per-node for jsrun")
        if self.minutes <= self.warning_minutes:
            raise InputError("time", self.time, f"longer than the {self.warning_minutes} minutes of --warning-minutes")
        if self.array is not None and (self.kind != "sweep" or not _is_array(self.array)):
            raise InputError(
                "array", self.array, "numbers and spans of lines, such as 1-4 or 1,3,7-9, for --kind sweep"
            )
        if self.output is not None and (not self.output or self.output.startswith("-") or "\n" in self.output):
            raise InputError("output", self.output, "the name of a folder, without line breaks; ./ goes before a dash")
        if self.resume not in ("auto", UNSET):
            raise InputError("resume", self.resume, "auto, from the newest checkpoint in --output if any, or unset")
        for field in ("account", "partition", "name"):
            value = getattr(self, field)
            if value is not None and not re.fullmatch(r"[\w.+:][\w.+:-]*", value):
                raise InputError(field, value, "a name of letters, digits and .+:-_, without a dash in front")

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", self.time, re.ASCII)
        if not found:
            raise InputError("time", self.time, "[D-]H:MM:SS")
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)

    @property
    def file_name(self) -> str:
        """The name of the script in ``jobs``."""
        if self.scheduler == "slurm":
            return f"{self.kind}.sbatch"
        return f"{self.kind}{'-jsrun' * (self.launcher == 'jsrun')}.lsf"

    def render(self, options: Sequence[str] = (), script: Path | None = None) -> str:
        """Return the text of the job's script.

        Parameters
        ----------
        options : options that the script passes to hpcavg.
        script : path of the script. None: the path is unknown, and the script is for the folder ``jobs``.
        """
        header = "jsrun" if self.launcher == "jsrun" else self.scheduler
        folder = "jobs" if script is None else _file_word(script.parent)
        environment = "jobs/environment.sh" if script is None else _file_word(script.parent / "environment.sh")
        name = "SCRIPT" if script is None else _file_word(script)
        values = {**self._values(), "script": name, "folder": folder, "environment": environment}
        values["options"] = "".join(f" {_word(option)}" for option in options)
        text = "".join((TEMPLATES / name).read_text() for name in (f"{header}.header", f"{self.kind}.body"))
        return _fill(text, values)

    def _values(self) -> dict[str, str | None]:
        """Return the values of the tokens in the templates."""
        is_slurm, is_sweep = self.scheduler == "slurm", self.kind == "sweep"
        name, array = self.name or f"hpcavg-{self.kind}", self.array or "1-4"
        warning_minutes = None if self.kind == "benchmarks" else self.warning_minutes  # it stops at SIGTERM
        log = ("%x-%A-%a" if is_sweep else "%x-%j") if is_slurm else f"{name}-{'%J-%I' if is_sweep else '%J'}"
        return {
            "purpose": PURPOSES[self.kind],
            "usage": " [OPTIONS OF THE SUITE]" if self.kind == "benchmarks" else " [OPTIONS OF HPCAVG]",
            "name": f"{name}[{array}]" if is_sweep and not is_slurm else name,
            "account": None if self.account == UNSET else self.account,
            "partition": self.partition,
            "nodes": str(self.nodes),
            "ranks": str(self.nodes * self.ranks_per_node),
            "ranks_per_node": str(self.ranks_per_node),
            "cpus_per_rank": str(self.cpus_per_rank),
            "gpus_per_node": str(self.gpus_per_node) if self.gpus_per_node else None,
            "gpus_per_rank": str(self.gpus_per_node // self.ranks_per_node),
            "exclusive": ("exclusive" if is_slurm else "x") if self.kind == "benchmarks" else None,
            "time": self.time if is_slurm else f"{self.minutes // 60}:{self.minutes % 60:02}",
            "warning_s": str(60 * warning_minutes) if warning_minutes else None,
            "warning_minutes": str(warning_minutes) if warning_minutes else None,
            "array": array if is_sweep else None,
            "requeue": "requeue" if self.kind == "requeue" else None,
            "requeue_status": str(int(ExitStatus.REQUEUE)) if self.kind == "requeue" else None,
            "log": f"{log}.log",
            "launcher": self.launcher,
            "output": '"$HPCAVG_RUNS/$job"' if self.output is None else _word(self.output),
            "resume": self.resume,
        }


def shipped() -> dict[str, str]:
    """Return the texts of the scripts in ``jobs`` by name: each kind for each scheduler and its launchers."""
    jobs = [Job("slurm", kind) for kind in PURPOSES]
    jobs += [Job("lsf", kind, launcher) for kind in PURPOSES for launcher in LAUNCHERS["lsf"]]
    return {job.file_name: job.render(script=Path("jobs", job.file_name)) for job in jobs}


def write(job: Job, options: Sequence[str], script: Path | None) -> None:
    """Write the job's script to `script`, and next to it the files that it sources. If `script` is None, print it.

    Raises `InputError` if `script` exists or cannot be written.
    """
    if script is None:
        sys.stdout.write(job.render(options))
        return
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        with script.open("x", encoding="utf-8") as file:
            file.write(job.render(options, script))
        for name in _COMPANIONS:
            if not (script.parent / name).exists():
                shutil.copy(TEMPLATES / name, script.parent / name)
    except OSError as error:
        raise InputError("script", script, f"a new file that can be written: {reason(error)}") from error
    print(f"{'sbatch' if job.scheduler == 'slurm' else 'bsub <'} {_file_word(script)}")


def _word(text: str) -> str:
    """Return `text` quoted as one word of bash, on one line: it may also stand in a comment."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    if re.fullmatch(r"[\w@%+=:,./ -]+", text):
        return f"'{text}'"
    # Quotes in which neither the shell nor shellcheck finds anything to expand.
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(char: str) -> str:
    if char.isalnum() or (char.isascii() and char.isprintable() and char not in "'\\"):
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def _file_word(path: Path) -> str:
    """Return `path` quoted as a word that no command reads as an option."""
    text = str(path)
    return _word(f"./{text}" if text.startswith("-") else text)


def _is_array(text: str) -> bool:
    """Return whether `text` is a list of line numbers, from 1 on."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text, re.ASCII):
        return False
    spans = [[int(number) for number in part.split("-")] for part in text.split(",")]
    return all(1 <= span[0] <= span[-1] for span in spans)


def _fill(text: str, values: Mapping[str, str | None]) -> str:
    """Return `text` with its tokens replaced. Lines with a token without a value are left out."""
    lines = [line for line in text.splitlines(True) if all(values[name] is not None for name in _TOKEN.findall(line))]
    return _TOKEN.sub(lambda token: values[token[1]] or "", "".join(lines))
