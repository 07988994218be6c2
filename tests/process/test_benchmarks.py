"""The suite runs every benchmark on two ranks, each measures something, and all is in JSON, tables and a page."""

import json
import shlex
import signal
import statistics
import time
from pathlib import Path

import pytest

from benchmarks.launching import mpirun
from benchmarks.presets import PRESETS
from tests.process.launch import FLAGS, run, start, warm_server

pytestmark = pytest.mark.process

NUM_RUNS = len(PRESETS["tiny"].runs)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Run the driver once with all there is; return its folder."""
    folder = tmp_path_factory.mktemp("suite") / "new" / "folder"
    launcher = shlex.join([mpirun(), "-np", "{ranks}", *FLAGS, *warm_server().prefix])
    arguments = ["--preset", "tiny", "--ranks", 2, "--launcher", launcher, "--output", folder]
    result = run(0, arguments, timeout=400, module="benchmarks.suite")
    lines = result.out.splitlines()
    assert result.status == 0, result.out + result.err
    assert [line.split(" done in ")[0] for line in lines[:-1]] == list(PRESETS["tiny"].runs)
    assert lines[-1] == f"{NUM_RUNS} of {NUM_RUNS} done: {folder}/index.html"
    assert result.err == ""
    return folder


@pytest.mark.parametrize("name", PRESETS["tiny"].runs)
def test_a_benchmark_prints_its_table_and_says_where_it_ran(name, suite):
    found = json.loads((suite / f"{name}.json").read_text())
    out = (suite / f"{name}.txt").read_text()
    environment = found["environment"]
    assert found["benchmark"] == name
    assert (environment["ranks"], environment["nodes"]) == (2, 1)
    assert f"benchmarks.{name}" in environment["command"]
    assert all(environment[key] for key in ("date", "platform", "torch", "mpi4py", "numpy", "mpi_library"))
    assert found["options"]["json"] == str(suite / f"{name}.json")
    assert found["results"]
    if name != "compare_algorithms":
        titles = [line for line in out.splitlines() if line.startswith("# ")]
        assert len(titles) == len(set(titles)) > 0
    check = globals().get(f"check_{name}")
    if check is not None:
        check(found["results"], out)


def test_the_suite_has_a_page_that_tells_of_all(suite):
    shown = (suite / "index.html").read_text()
    assert f"{NUM_RUNS} done, 0 failed, 0 not run" in shown
    assert '<h2 id="auto-over-best">' in shown
    assert (suite / "auto-over-best-dark.svg").read_text().startswith("<?xml")
    for name in PRESETS["tiny"].runs:
        assert f'<h2 id="{name}">' in shown
        assert f'src="{name}-light.svg"' in shown
        assert (suite / f"{name}-light.svg").read_text().startswith("<?xml")


def test_a_suite_is_compared_with_itself(suite):
    result = run(0, [suite, suite / "mean.json"], module="benchmarks.compare")
    assert result.status == 0, result.err
    assert "only in A: overlap\n" in result.out
    # 3 repeats have no interval
    assert " B has 0 better and 0 worse, their intervals apart; 0 with" in result.out


def test_failed_benchmarks_are_on_the_page(tmp_path):
    launcher = "sh -c 'echo no ranks; exit 3' {ranks}"
    arguments = ["--only", "mean", "own_pace", "--launcher", launcher, "--output", tmp_path]
    result = run(0, arguments, module="benchmarks.suite")
    assert result.status == 1
    assert result.out.count(" failed in ") == 2
    shown = (tmp_path / "index.html").read_text()
    assert shown.count("Failed: it ended with status 3. Its output ends with:</p><pre>no ranks</pre>") == 2


def test_a_signal_ends_the_suite_and_all_it_has_started(tmp_path):
    launcher = "sh -c 'sleep 100; exit' {ranks}"
    process = start(0, ["--only", "mean", "own_pace", "--launcher", launcher, "--output", tmp_path], "benchmarks.suite")
    deadline = time.monotonic() + 30
    while not (tmp_path / "mean.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "mean failed in" in out
    assert "SIGTERM ended it" in out
    assert "Not run: SIGTERM ended the suite." in (tmp_path / "index.html").read_text()
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in words_of(path)]


def words_of(path):
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


def check_mean(results, out):
    assert set(results["seconds"]) == {"1024", "1000000"}
    for seconds in results["seconds"].values():
        assert {"copy once", "MPI Allreduce", "hpcavg auto", "hpcavg mpi", "torch periodic"} <= set(seconds)
        assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
        assert "lane Allreduce" not in seconds  # there is one node
    assert set(results["auto_over_best"]) == set(results["seconds"])
    for size, found in results["auto_over_best"].items():
        medians = {name: statistics.median(values) for name, values in results["seconds"][size].items()}
        assert (found["auto_s"], found["best_s"]) == (medians.pop("hpcavg auto"), medians[found["best"]])
        assert found["best_s"] == min(value for name, value in medians.items() if name != "copy once")
        assert found["ratio"] == found["auto_s"] / found["best_s"]
        assert found["overlap"] is None  # 3 repeats have no interval
    assert out.count("auto over best: ") == 2
    assert [line.split()[0] for line in out.partition("# auto over best")[2].splitlines()[2:4]] == ["1024", "1000000"]


def check_overlap(results, out):
    for found in results.values():
        assert len(found["overlap_percent"]) == len(found["compute_inside_s"]) == 2
        assert min(found["overlap_percent"]) >= 0


def check_training(results, out):
    assert list(results) == ["single", "sgd", "ddp", "hier_avg", "dasgd"]
    hier_avg, dasgd = results["hier_avg"][0], results["dasgd"][0]
    assert (hier_avg["steps"], dasgd["steps"]) == (4 * hier_avg["means"], 4 * dasgd["means"])
    assert 0 <= dasgd["hidden"] <= 1
    assert hier_avg["hidden"] is None


def check_scaling(results, out):
    assert set(results["samples_per_s"]) == {"weak", "strong"}
    assert set(results["samples_per_s"]["weak"]["k_avg"]) == {"1", "2"}


def check_memory(results, out):
    assert list(results["copies"]) == ["plain", "k_avg, auto", "dasgd, auto"]


@pytest.mark.parametrize(
    ("ranks", "name", "arguments", "line"),
    [
        (2, "mean", "--bytes 2", "error: --bytes 2: must be an integer of at least 4"),
        (0, "training", "--algorithms downpour", "error: --algorithms downpour: must be algorithms whose learners"),
        (0, "overlap", "--repeats many", "error: argument --repeats: invalid int value: 'many'"),
        (
            2,
            "mean",
            "--bytes 8 --only 'lane Allreduce'",
            "error: --only lane Allreduce: must be what can run on 1 node",
        ),
        (0, "suite", "--preset slow", "error: --preset slow: must be one of tiny, quick, full, nodes"),
        (0, "suite", "--only soak", "error: --only soak: must be one of mean, "),
        (0, "suite", "--output tests", "error: --output tests: must be a new or empty folder"),
        (
            0,
            "suite",
            "--launcher nosuch",
            "error: --launcher nosuch: must be a command that exists: there is no nosuch",
        ),
        (0, "compare", "tests tests", "error: tests/suite.json: must be the folder of a suite (No such file"),
    ],
)
def test_bad_input_is_one_line(ranks, name, arguments, line):
    result = run(ranks, shlex.split(arguments), module=f"benchmarks.{name}")
    assert result.status == 2
    assert result.err.startswith(line)
    assert result.err.count("error: ") == 1
    assert result.out == ""
