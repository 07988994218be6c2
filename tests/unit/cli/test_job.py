"""Job scripts: those shipped are what the templates give, options end where they belong, bad ones are told."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpcavg.cli import parsers
from hpcavg.cli.job import Job, shipped, write
from hpcavg.errors import InputError

JOBS = Path(__file__).parents[3] / "jobs"


def test_the_shipped_scripts_are_what_the_templates_give():
    found = {path.name: path.read_text() for path in JOBS.iterdir() if path.suffix in (".sbatch", ".lsf")}
    assert found == shipped(), "make jobs writes them anew"


def test_every_option_is_where_its_scheduler_looks():
    text = Job(
        "slurm",
        nodes=16,
        ranks_per_node=4,
        gpus_per_node=4,
        cpus_per_rank=12,
        time="1-04:00:00",
        warning_minutes=5,
        account="physics",
        partition="gpu",
        name="mine",
        output="my runs",
    ).render(["--algorithm", "k-avg"])
    for line in (
        "--job-name=mine",
        "--account=physics",
        "--partition=gpu",
        "--nodes=16",
        "--ntasks-per-node=4",
        "--cpus-per-task=12",
        "--gpus-per-node=4",
        "--time=1-04:00:00",
        "--signal=B:USR1@300",
    ):
        assert f"\n#SBATCH {line}\n" in text
    command = shlex.split(text.splitlines()[-1])
    assert command == ["train", "--output", "my runs", "--resume", "auto", "--algorithm", "k-avg", "$@"]

    text = Job("lsf", nodes=3, ranks_per_node=2, gpus_per_node=2, time="0:59:01", partition="batch").render()
    for line in (
        "-n 6",
        '-R "span[ptile=2] affinity[core(8)]"',
        '-gpu "num=2"',
        "-W 1:00",
        "-q batch",
        "-wt 3 -wa USR1",
    ):
        assert f"\n#BSUB {line}\n" in text
    assert "\nHPCAVG_RANKS=6 HPCAVG_RANKS_PER_NODE=2 HPCAVG_CPUS_PER_RANK=8\n" in text

    text = Job("lsf", launcher="jsrun", nodes=3, ranks_per_node=2, gpus_per_node=6).render()
    assert "\n#BSUB -nnodes 3\n" in text
    assert "\nHPCAVG_GPUS_PER_RANK=3\n" in text


def test_what_has_no_value_leaves_no_line():
    text = Job("slurm").render()
    assert "gpus" not in text
    assert "partition" not in text
    assert "account" in text
    assert "account=" not in Job("slurm", account="unset").render()
    assert "USR1" in text
    assert "USR1" not in Job("slurm", "benchmarks").render()
    assert "--array" not in text
    assert "--array=2,5-7\n" in Job("slurm", "sweep", array="2,5-7").render()
    assert "[2,5-7]" in Job("lsf", "sweep", array="2,5-7").render()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"nodes": 0}, "nodes"),
        ({"gpus_per_node": -1}, "gpus_per_node"),
        ({"time": "4:00"}, "time"),
        ({"time": "0:03:00"}, "time"),
        ({"kind": "sweep", "array": "1-"}, "array"),
        ({"kind": "sweep", "array": "0-3"}, "array"),
        ({"kind": "sweep", "array": "9-3"}, "array"),
        ({"array": "1-3"}, "array"),
        ({"name": "a/b"}, "name"),
        ({"account": "a b"}, "account"),
        ({"name": "x;rm"}, "name"),
        ({"name": "x\n#SBATCH --wrap=rm"}, "name"),
        ({"partition": "-x"}, "partition"),
        ({"time": "\u0661:00:00"}, "time"),
        ({"output": ""}, "output"),
        ({"output": "-x"}, "output"),
        ({"output": "a\nb"}, "output"),
        ({"resume": "runs/mine"}, "resume"),
        ({"launcher": "jsrun"}, "launcher"),
        ({"scheduler": "lsf", "launcher": "srun"}, "launcher"),
        ({"scheduler": "lsf", "launcher": "jsrun", "gpus_per_node": 6}, "gpus_per_node"),
    ],
)
def test_what_cannot_be_asked_for_is_told(options, option):
    with pytest.raises(InputError) as error:
        Job(**{"scheduler": "slurm", **options})
    assert error.value.option == option


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("pbs", "job pbs: must be one of slurm, lsf"),
        ("slurm --kind tran", "--kind tran: must be one of train, sweep, requeue, benchmarks"),
        ("slurm --nodes two", "--nodes two: must be an integer of at least 1 and at most 1000000"),
    ],
)
def test_what_the_command_cannot_use_is_told_as_the_options_of_train_are(arguments, line):
    with pytest.raises(InputError) as caught:
        parsers.write_job(arguments.split())
    assert caught.value.as_option() == line


def test_the_command_checks_the_options_of_train_and_overwrites_nothing(tmp_path, capsys):
    script = tmp_path / "mine" / "a.sbatch"
    with pytest.raises(InputError, match="k=0"):
        parsers.write_job(["slurm", "--algorithm", "k-avg", "--k", "0", "--script", str(script)])
    with pytest.raises(InputError, match="--k7"):
        parsers.write_job(["slurm", "--k7", "4"])
    assert not script.parent.exists()

    parsers.write_job(["slurm", "--nodes", "4", "--k1", "4", "--k2", "32", "--script", str(script)])
    assert capsys.readouterr().out == f"sbatch {script}\n"
    assert script.read_text().endswith('--resume auto --k1 4 --k2 32 "$@"\n')
    assert f"jobs=${{HPCAVG_JOBS-{script.parent}}}\n" in script.read_text()
    assert f"where {script.parent}/environment.sh is found: sbatch {script} [OPTIONS" in script.read_text()
    for name in ("environment.sh", "restart.sh", "sweep.txt"):
        assert (script.parent / name).read_text() == (JOBS / name).read_text()

    (script.parent / "environment.sh").write_text("mine")
    with pytest.raises(InputError, match="script"):
        parsers.write_job(["slurm", "--script", str(script)])
    parsers.write_job(["lsf", "--kind", "requeue", "--script", str(script.with_name("b.lsf"))])
    assert (script.parent / "environment.sh").read_text() == "mine"

    capsys.readouterr()
    parsers.write_job(["lsf", "--launcher", "jsrun", "--kind", "sweep"])
    assert capsys.readouterr().out == shipped()["sweep-jsrun.lsf"].replace("jobs/sweep-jsrun.lsf", "SCRIPT")


def test_ranks_are_compared_with_what_the_options_want(capsys):
    recipe = ["--config", "hier-avg/table1-p16-k2-64"]
    with pytest.raises(InputError, match="at most 2, the number of learners"):
        parsers.write_job(["slurm", "--nodes", "1", "--ranks-per-node", "2", *recipe])
    parsers.write_job(["slurm", "--nodes", "2", "--ranks-per-node", "4", *recipe])
    assert capsys.readouterr().err == "hpcavg: warning: the options are meant for 16 learners, not 8\n"
    parsers.write_job(["slurm", "--nodes", "2", "--ranks-per-node", "4", *recipe, "--learners-per-rank", "2"])
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="learners=12: must be a multiple of 8"):
        parsers.write_job(["slurm", "--nodes", "2", "--ranks-per-node", "4", *recipe, "--learners", "12"])
    with pytest.raises(InputError, match="group_size=4: must be a multiple or a divisor of learners_per_rank, 3"):
        parsers.write_job(["slurm", "--nodes", "2", "--ranks-per-node", "4", *recipe, "--learners-per-rank", "3"])


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Return a function that writes a script and runs it as Slurm would, with a launcher that only keeps its words."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    launcher = tmp_path / "bin" / "mpirun"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {kept}\n')
    launcher.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    job |= {"SLURM_JOB_END_TIME": "9999999999", "SLURM_ARRAY_TASK_ID": "2", "HPCAVG_VENV": ""}
    paths = {"PATH": f"{launcher.parent}:{os.environ['PATH']}", "HPCAVG_JOBS": str(tmp_path)}

    def submit(*arguments):
        script = tmp_path / "a.sbatch"
        script.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)
        parsers.write_job(["slurm", "--script", str(script), *arguments])
        words = {"capture_output": True, "text": True, "timeout": 60}
        result = subprocess.run(["bash", script, "--seed", "3"], env={**os.environ, **job, **paths}, **words)
        calls = kept.read_text().splitlines() if kept.exists() else []
        return result.stderr.splitlines()[-1], [shlex.split(call.partition(" -m hpcavg ")[2]) for call in calls]

    return submit


def test_the_output_stands_once_in_a_script_whoever_chooses_it(submit):
    # Nothing has left a summary, so it is tried four times.
    assert submit("--k1", "4")[1] == 4 * [["--output", "runs/mine-7", "--resume", "auto", "--k1", "4", "--seed", "3"]]
    chosen = submit("--output", "my", "--k1", "4", "--resume=auto")[1]
    assert chosen[0] == ["--output", "my", "--resume", "auto", "--k1", "4", "--seed", "3"]
    swept = submit("--kind", "sweep", "--output=my")[1]
    assert swept[0][:6] == ["--output", "my/2", "--resume", "auto", "--seed", "3"]
    assert swept[0][6:] == ["--algorithm", "hier-avg", "--k1", "4", "--k2", "32"]


def test_algorithms_with_servers_are_trained_once(submit):
    with pytest.raises(InputError, match="resume='auto': must be unset for downpour"):
        submit("--algorithm", "downpour")
    words = ["--output", "runs/mine-7", "--resume", "unset", "--algorithm", "downpour", "--seed", "3"]
    assert submit("--algorithm", "downpour", "--resume", "unset") == ("job: done", [words])


# -- whatever folders and options are called ------------------------------------------------------------------------

# What the shell would do something with, beside any text that may stand on a command line.
NASTY = [
    "$(touch pwned)",
    "`touch pwned`",
    "a\ntouch pwned\n#",
    "; touch pwned;",
    "it's",
    'a"b',
    "\\",
    "a\\",
    "}",
    "${x}",
    "~",
    "-",
]
NASTY += [
    "-rf",
    "--",
    "*",
    "!!",
    "# no",
    "&& touch pwned",
    "a  b",
    " ",
    "\t",
    "\r",
    "\u201cx\u201d",
    "caf\u00e9",
    "\u2028",
    "\udcff",
    "%s",
    "@output@",
]
texts = st.lists(
    st.sampled_from(NASTY) | st.text(st.characters(exclude_characters="\0"), max_size=9), min_size=1, max_size=3
).map("".join)
"""Texts of one line or several, with bytes that are no UTF-8."""


def is_nameable(text):
    """Return whether a file system can take the text, made of what a command line holds, as the name of a file."""
    try:
        return text not in (".", "..") and len(os.fsencode(text)) < 200 and os.fsdecode(os.fsencode(text)) == text
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


names = texts.map(lambda text: text.replace("/", "")).filter(lambda text: text and is_nameable(text))
values = texts.filter(is_nameable)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return a function that runs a script as its scheduler would; it returns the words behind hpcavg's name.

    The launchers of its PATH write the words that they are given, and end as after bad input.
    """
    folder = tmp_path_factory.mktemp("started")
    for name in ("mpirun", "srun", "jsrun", "python"):
        launcher = folder / name
        launcher.write_text(f'#!/bin/sh\nprintf "%s\\0" "$0" "$@" > {folder}/words\nexit 2\n')
        launcher.chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "HPCAVG_VENV": "", "LC_ALL": "C.UTF-8"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    slurm |= {"SLURM_JOB_END_TIME": "9999999999", "SLURM_ARRAY_TASK_ID": "1"}
    lsf = {"LSB_JOBID": "7", "LSB_JOBNAME": "mine", "LSB_JOBINDEX": "1"}

    def started(job, script):
        (folder / "words").unlink(missing_ok=True)
        is_slurm = job.scheduler == "slurm"
        command = ["bash", *(["--", script] if is_slurm else [])]
        with script.open() as text:
            form = {"stdin": None if is_slurm else text, "env": environ | (slurm if is_slurm else lsf)}
            result = subprocess.run(command, capture_output=True, timeout=60, **form)
        assert result.returncode == 2, result.stderr
        assert (folder / "words").exists(), result.stderr
        launcher, *words = [os.fsdecode(word) for word in (folder / "words").read_bytes().split(b"\0")[:-1]]
        assert Path(launcher).name == ("python" if job.kind == "benchmarks" else job.launcher)
        return words[words.index("-m") + 2 :]

    return started


SOURCED = """
HPCAVG_RUNS=runs job=mine array_task=1 launcher=(mpirun) python=(python)
echo "$HPCAVG_LAUNCHER $HPCAVG_WARNING_S $HPCAVG_RANKS"
echo "$HPCAVG_RANKS_PER_NODE $HPCAVG_CPUS_PER_RANK $HPCAVG_GPUS_PER_RANK"
echo "${launcher[*]} ${python[*]} $HPCAVG_RUNS $job $array_task"
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder for scripts, all of which are looked over at the end."""
    folder = tmp_path_factory.mktemp("written")
    yield folder
    scripts = [*folder.rglob("*.script")]
    assert scripts
    if shutil.which("shellcheck"):
        # In place of the true one, which is looked over with the scripts of jobs, and would take seconds for each.
        (folder / "environment.sh").write_text(SOURCED)
        (folder / ".shellcheckrc").write_text("external-sources=true\n")
        command = ["shellcheck", *scripts]
    else:  # which CI has; without it, whether bash can read them
        command = ["bash", "-c", 'for script in "$@"; do bash -n "$script" || exit; done', "bash", *scripts]
    result = subprocess.run(command, capture_output=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stdout.decode(errors="replace")[:3000]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([("slurm", "mpirun"), ("slurm", "srun"), ("lsf", "mpirun"), ("lsf", "jsrun")]),
    st.sampled_from(["train", "requeue", "sweep", "benchmarks"]),
    names,
    names,
    st.none() | values,
    st.lists(values, max_size=3),
)
@example(("slurm", "mpirun"), "train", "-$(touch pwned)", "-`touch pwned`", "a b\\", ["a\ntouch pwned", "--x=\udcff"])
def test_what_is_written_says_just_what_it_was_told(started, written, scheduler, kind, folder, name, output, options):
    if output is not None and (output[:1] in ("", "-") or "\n" in output):
        with pytest.raises(InputError, match="output=") as error:
            Job(scheduler[0], kind, scheduler[1], output=output)
        assert "\n" not in error.value.as_option()
        return
    job = Job(scheduler[0], kind, scheduler[1], output=output)
    # Relative, so that a dash comes first; a folder of its own for each.
    cwd = Path(tempfile.mkdtemp(dir=written))
    before = os.getcwd()
    os.chdir(cwd)
    try:
        script = Path(folder, f"{name}.script")
        write(job, options, script)
        (script.parent / "sweep.txt").write_text("--of sweep\n")
        words = started(job, script)
    finally:
        os.chdir(before)
    assert not [*cwd.rglob("pwned")], "it ran what was only a name"
    chosen = output if output is not None else "runs/mine-7"
    if kind == "benchmarks":
        assert words == ["--preset", "quick", "--launcher", words[3], "--output", chosen, *options]
    elif kind == "sweep":
        assert words == ["--output", f"{chosen}/1", "--resume", "auto", *options, "--of", "sweep"]
    else:
        assert words == ["--output", chosen, "--resume", "auto", *options]
