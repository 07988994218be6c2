"""``python -m hpcavg job``: job scripts for Slurm and LSF, from the templates in ``job_scripts``. Light to import."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcavg.errors import InputError, reason, require_integer
from hpcavg.utils.exit_status import ExitStatus

TEMPLATES = Path(__file__).parent / "job_scripts"
PURPOSES = {
    "train": "Trains once. Near the time limit it stops with a checkpoint, from which the same run can go on.",
    "sweep": "Trains once per line of sweep.txt, as an array of jobs.",
    "requeue": "Trains for longer than the time limit: near it, it stops with a checkpoint and queues itself again.",
    "benchmarks": "Runs the benchmark suite and writes a page of its figures.",
}
LAUNCHERS = {"slurm": ("mpirun", "srun"), "lsf": ("mpirun", "jsrun")}
CHANGE_ME, UNSET = "CHANGE_ME", "unset"
# What the scripts need beside them; the user's own are left as they are.
_COMPANIONS = ("environment.sh", "restart.sh", "sweep.txt")
_TOKEN = re.compile(r"@([a-z_]+)@")


@dataclass(frozen=True)
class Job:
    """What a job asks of its scheduler. Raises `InputError` naming the option.

    Parameters
    ----------
    scheduler : ``"slurm"`` or ``"lsf"``. kind : one of `PURPOSES`. launcher : one of the scheduler's `LAUNCHERS`.
    nodes, ranks_per_node, cpus_per_rank, gpus_per_node : the allocation.
    time : the limit, as [D-]H:MM:SS. warning_minutes : how long before it ranks are asked for a checkpoint.
    account, partition, name : as the scheduler knows them; LSF's words for the first two are project and queue.
    array : the tasks of a sweep, such as 1-4.
    output : the folder of the run, or of a sweep's runs; None: one of the job's own. resume : auto or unset.
    """

    scheduler: str
    kind: str = "train"
    launcher: str = "mpirun"
    nodes: int = 2
    ranks_per_node: int = 4
    cpus_per_rank: int = 8
    gpus_per_node: int = 0
    time: str = "1:00:00"
    warning_minutes: int = 3
    account: str = CHANGE_ME
    partition: str | None = None
    name: str | None = None
    array: str | None = None
    output: str | None = None
    resume: str = "auto"

    def __post_init__(self) -> None:
        allowed = LAUNCHERS[self.scheduler]
        if self.launcher not in allowed:
            raise InputError("launcher", self.launcher, f"{' or '.join(allowed)} for {self.scheduler}")
        for option, least in {"nodes": 1, "ranks_per_node": 1, "cpus_per_rank": 1, "gpus_per_node": 0}.items():
            require_integer(option, getattr(self, option), least, 10**6)
        if self.launcher == "jsrun" and self.gpus_per_node % self.ranks_per_node:
            raise InputError("gpus_per_node", self.gpus_per_node, "a multiple of --ranks-per-node for jsrun")
        require_integer("warning_minutes", self.warning_minutes, 1)
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
        for option in ("account", "partition", "name"):
            value = getattr(self, option)
            if value is not None and not re.fullmatch(r"[\w.+:][\w.+:-]*", value):
                raise InputError(option, value, "a name of letters, digits and .+:-_, without a dash in front")

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
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
        """Return the text of the job's script, which gives `options` to hpcavg.

        script : where it will lie; None: nobody knows its name, and it is meant for ``jobs``.
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
        """Return what stands for the tokens of the templates."""
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
    """Return the scripts of ``jobs`` by their names: every kind for every scheduler and its launchers, by default."""
    jobs = [Job("slurm", kind) for kind in PURPOSES]
    jobs += [Job("lsf", kind, launcher) for kind in PURPOSES for launcher in LAUNCHERS["lsf"]]
    return {job.file_name: job.render(script=Path("jobs", job.file_name)) for job in jobs}


def write(job: Job, options: Sequence[str], script: Path | None) -> None:
    """Write the job's script to `script`, with the files that it sources beside it, or print it where that is None.

    Raises `InputError` where `script` exists or cannot be written.
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
    """Return `text` as one word of bash, on one line: it may stand in a comment, too."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    if re.fullmatch(r"[\w@%+=:,./ -]+", text):
        return f"'{text}'"
    # Quotes in which nothing is left to be found by the shell, and by shellcheck.
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(char: str) -> str:
    if char.isalnum() or (char.isascii() and char.isprintable() and char not in "'\\"):
        return char
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def _file_word(path: Path) -> str:
    """Return `path` as a word that no command takes for an option."""
    text = str(path)
    return _word(f"./{text}" if text.startswith("-") else text)


def _is_array(text: str) -> bool:
    """Return whether `text` lists lines, which count from 1."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text, re.ASCII):
        return False
    spans = [[int(number) for number in part.split("-")] for part in text.split(",")]
    return all(1 <= span[0] <= span[-1] for span in spans)


def _fill(text: str, values: Mapping[str, str | None]) -> str:
    """Return `text` with its tokens replaced, and without the lines that have one for which there is no value."""
    lines = [line for line in text.splitlines(True) if all(values[name] is not None for name in _TOKEN.findall(line))]
    return _TOKEN.sub(lambda token: values[token[1]] or "", "".join(lines))
