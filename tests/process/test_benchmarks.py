"""Every benchmark measures something on two ranks, prints its table once, and leaves JSON that says where it ran."""

import json

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process

TINY = {
    "mean": "--bytes 1024 1000000 --repeats 3",
    "overlap": "--bytes 40000 --repeats 2",
    "training": "--seconds 0.01 --repeats 1 --max-epochs 1 --algorithms hier_avg dasgd --k1 2 --k2 4 --tau 4 --delay 2",
    "scaling": "--seconds 0.01 --repeats 1 --parameters 1e4 --algorithms k-avg",
    "memory": "--parameters 1e6 --algorithms k_avg dasgd",
    "own_pace": "--seconds 0.2 --budget-s 0.1",
    "step_overhead": "--rounds 2 --calls 2",
}


def measured(name, arguments, tmp_path, **changes):
    path = tmp_path / "figures.json"
    result = run(2, [*arguments.split(), "--json", path], module=f"benchmarks.{name}", **changes)
    assert result.status == 0, result.err
    return json.loads(path.read_text()), result.out


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_prints_its_table_and_says_where_it_ran(name, tmp_path):
    found, out = measured(name, TINY[name], tmp_path)
    environment = found["environment"]
    assert (environment["ranks"], environment["nodes"]) == (2, 1)
    assert environment["command"][2:4] == [f"benchmarks.{name}", *TINY[name].split()][:2]
    assert all(environment[key] for key in ("date", "platform", "cpus", "torch", "mpi4py", "numpy", "mpi_library"))
    assert found["options"]["json"] == str(tmp_path / "figures.json")
    assert found["results"]
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    assert len(titles) == len(set(titles)) > 0
    check = globals().get(f"check_{name}")
    if check is not None:
        check(found["results"], out)


def check_mean(results, out):
    assert set(results["seconds"]) == {"1024", "1000000"}
    for seconds in results["seconds"].values():
        assert {"copy once", "MPI Allreduce", "hpcavg auto", "hpcavg mpi", "torch periodic"} <= set(seconds)
        assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
    assert out.count("best engine: ") == 2


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
    ],
)
def test_bad_input_is_one_line(ranks, name, arguments, line):
    result = run(ranks, arguments.split(), module=f"benchmarks.{name}")
    assert result.status == 2
    assert result.err.startswith(line)
    assert result.err.count("error: ") == 1
    assert result.out == ""
