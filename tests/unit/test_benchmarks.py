"""The benchmarks' formulas against numbers worked by hand."""

import importlib
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import cluster, compare, figures, launching, page, plots, presets, results, suite
from benchmarks.common import interval
from benchmarks.mean import memory_needed, over_best_line, wire_s
from benchmarks.memory import memory_of
from benchmarks.options import Parser
from benchmarks.overlap import overlap_percent
from benchmarks.results import read_record
from benchmarks.scaling import batch_of, rank_counts
from benchmarks.workloads import build_rule, first_period, mlp, mlp_workload
from hpcavg import InputError, algorithms
from hpcavg.cli import parsers


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [
        (1, 1, 1),
        (5, 1, 5),  # 2/2^5 is more than 5 %: the whole range is the best there is
        (6, 1, 6),  # 2/2^6 = 3.1 %
        (9, 2, 8),  # 2 (1 + 9)/2^9 = 3.9 %; with 36 more it would be 18 %
        (15, 4, 12),  # 2 (1 + 15 + 105 + 455)/2^15 = 3.5 %; with 1365 more it would be 12 %
        (100, 40, 61),  # 3.5 %, as in the tables
    ],
)
def test_the_interval_of_a_median_is_the_binomial_one(count, low, high):
    values = list(range(count, 0, -1))
    assert interval(values) == ((count + 1) / 2, low, high)


def test_a_median_of_infinite_times_is_infinite():
    assert interval([1.0, math.inf, math.inf])[0] == math.inf


@pytest.mark.parametrize(
    ("total_s", "compute_s", "pure_s", "percent"),
    [
        (1.3, 1.3, 1.0, 100.0),  # nothing of the mean is left to wait for
        (2.3, 1.3, 1.0, 0.0),  # one after the other
        (1.55, 1.3, 1.0, 75.0),
        (3.0, 1.3, 1.0, 0.0),  # slower than one after the other
    ],
)
def test_overlap_follows_the_formula(total_s, compute_s, pure_s, percent):
    assert overlap_percent(total_s, compute_s, pure_s) == pytest.approx(percent)


def test_the_wire_limit_of_a_mean_over_nodes():
    """44.7 MB between 2 nodes at 1 Gbit/s: 2 (1/2) x 44.7e6 x 8 bits; at 4 nodes 1.5 times that."""
    assert wire_s(44_700_000, 2, 1.0) == pytest.approx(0.3576)
    assert wire_s(44_700_000, 4, 1.0) == pytest.approx(0.5364)


def test_memory_of_a_size_counts_every_rank_of_the_node():
    assert memory_needed(100, num_shared=2, ranks_on_node=4) == (3 + 4) * 100 * 4


def seconds_of(values):
    return {name: figures.Figure(tuple(of_name), "s", "less") for name, of_name in values.items()}


@pytest.mark.parametrize(
    ("auto", "best", "overlap", "told"),
    [
        ([0.004, 0.003, 0.003], [0.002] * 3, None, "too few repeats"),
        ([0.001, 0.002, 0.003, 0.003, 0.004, 0.005], [0.002] * 6, True, "overlap"),  # 1 to 5 ms
        ([0.003] * 6, [0.001, 0.002, 0.002, 0.002, 0.002, 0.0025], False, "apart"),  # 1 to 2.5 ms
    ],
)
def test_auto_is_compared_with_the_best_of_all_else_that_averages(auto, best, overlap, told):
    """3 ms over 2 ms; the floors are faster, and no mean."""
    floors = {"copy once": [1e-4], "the wire alone": [1e-3]}
    slower = {"hpcavg mpi": [0.004], "torch periodic": [0.005]}
    found = figures.auto_over_best(seconds_of({**floors, **slower, "hpcavg auto": auto, "lane Allreduce": best}))
    assert found == (0.003, "lane Allreduce", 0.002, pytest.approx(1.5), pytest.approx(0.001), overlap)
    assert over_best_line(found) == f"auto over best: 1.500 (+1000.0 us over lane Allreduce; 95 % intervals: {told})"


@pytest.mark.parametrize("name", ["hpcavg auto", "MPI Allreduce"])
def test_without_auto_or_another_mean_nothing_is_compared(name):
    assert figures.auto_over_best(seconds_of({"copy once": [1.0], name: [2.0]})) is None


def test_memory_counts_shared_pages_once_among_the_ranks():
    """1000 kB of Pss without its 300 kB of shared memory, and a quarter of the 2 MiB that four ranks map."""
    rollup = "0-1 ---p 00000000 00:00 0 [rollup]\nPss: 1000 kB\nPss_Shmem: 300 kB\n"
    maps = "200000-400000 rw-s 00000000 00:19 7 /dev/shm/hpcavg-x (deleted)\n400000-500000 r--p 0 fd:00 8 /lib/x.so\n"
    assert memory_of(rollup, maps, 4) == 700 * 1024 + 2 * 1024 * 1024 // 4


def test_ranks_double_up_to_all_of_them():
    assert [rank_counts(number) for number in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_strong_scaling_shares_one_batch():
    assert [batch_of("strong", 32, 4, count) for count in (1, 2, 4)] == [128, 64, 32]
    assert [batch_of("weak", 32, 4, count) for count in (1, 2, 4)] == [32, 32, 32]


def test_the_first_period_is_that_of_the_schedule():
    rules = [algorithms.sgd(), algorithms.sync_sgd(), algorithms.hier_avg(4, 32), algorithms.dasgd(6, 5), "ddp", None]
    assert [first_period(rule, 4) for rule in rules] == [1, 1, 32, 6, 1, 1]


def test_rules_take_the_options_that_are_theirs():
    assert build_rule("hier_avg", {"k": 3, "k1": 2, "k2": 6, "tau": None}).options == {"k1": 2, "k2": 6}
    with pytest.raises(InputError, match="downpour"):
        build_rule("downpour", {})


def test_the_perceptron_has_the_parameters_asked_for():
    assert sum(p.numel() for p in mlp(50).parameters()) == 4 * 50**2
    inputs, targets = next(mlp_workload(1e4).batches(2, 1, 8))
    assert inputs.shape == (8, 50)
    assert targets.shape == (8,)


# -- the suite and its page ------------------------------------------------------------------------------------------

RUNNABLE = {
    path.stem for path in Path(presets.__file__).parent.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()
}


@pytest.mark.parametrize("name", ["tiny", "quick", "full"])
def test_every_benchmark_is_in_all_presets_of_one_job_or_left_out_for_a_reason(name):
    modules = {words.split()[0] for words in presets.PRESETS[name].runs.values()}
    assert modules | set(presets.LEFT_OUT) == RUNNABLE
    assert not modules & set(presets.LEFT_OUT)
    assert modules == set(figures._READERS)


def test_means_on_emulated_nodes_are_of_every_arrangement_and_rate():
    preset = presets.PRESETS["nodes"]
    clusters = {name: cluster.parse([*shlex.split(words), "true"])[0] for name, words in preset.clusters.items()}
    assert list(preset.runs) == list(clusters)
    assert clusters["2x1-no-limit"] == cluster.Cluster((1, 1), yields=True)
    assert clusters["4x1-1gbit"] == cluster.Cluster((1, 1, 1, 1), rate="1gbit", yields=True)
    assert len({(each.slots, each.rate) for each in clusters.values()}) == 9
    launcher, ranks = suite.on_cluster(preset.clusters["2x2-10gbit"])
    assert ranks == 4
    words = suite.command(["mean", "--bytes", "8"], launcher, ranks, Path("x.json"))
    start = [sys.executable, "-m", "benchmarks.cluster", "--yield", "--slots", "2,2", "--rate", "10gbit", "--"]
    assert words == [*start, sys.executable, "-m", "benchmarks.mean", "--bytes", "8", "--json", "x.json"]


@pytest.mark.parametrize(("preset", "name"), [(p, name) for p in presets.PRESETS for name in presets.PRESETS[p].runs])
def test_a_benchmark_takes_the_options_of_its_presets(preset, name, monkeypatch):
    module, *words = shlex.split(presets.PRESETS[preset].runs[name])
    words += [f"--{key.replace('_', '-')}=1" for key, modules in presets.HANDED_ON.items() if module in modules]

    class Parsed(Exception):
        pass

    def parse_known_args(self, *arguments):
        raise Parsed(*original(self, words))

    original = Parser.parse_known_args
    monkeypatch.setattr(Parser, "parse_known_args", parse_known_args)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(f"benchmarks.{module}").main()
    options, passed_on = caught.value.args
    assert module == "compare_algorithms" or not passed_on
    parsers.parse_train(passed_on)  # what is left goes to hpcavg
    for algorithm in getattr(options, "algorithms", None) or ():
        assert build_rule(algorithm.replace("-", "_"), {})


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # left over from a job, but no job
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "8(x2),4"}, 20),
        ({"SLURM_JOB_ID": "7"}, 1),
        ({"LSB_JOBID": "7", "LSB_DJOB_NUMPROC": "12"}, 12),
    ],
)
def test_a_job_says_how_many_ranks_there_are(variables, ranks, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE", "LSB_JOBID", "LSB_DJOB_NUMPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MPIRUN": "/opt/my mpi/mpirun", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPIRUN_FLAGS", raising=False)
    assert launching.job_ranks(variables) == ranks
    assert launching.default_ranks() == (ranks or 4)
    flags = "" if ranks else " --oversubscribe --bind-to none"
    assert launching.default_launcher() == f"'/opt/my mpi/mpirun' -np {{ranks}}{flags}"
    monkeypatch.setenv("MPIRUN_FLAGS", "--bind-to core")
    assert launching.default_launcher() == "'/opt/my mpi/mpirun' -np {ranks} --bind-to core"


def test_the_launcher_is_a_template():
    assert launching.launch("env -n={ranks} 'a b'", 8, ["x"]) == ["env", "-n=8", "a b", "x"]
    for template, allowed in [("", "no word"), ("none-such {ranks}", "no none-such"), ("env '{ranks}", "quotation")]:
        with pytest.raises(InputError, match=re.escape(allowed)):
            launching.launch(template, 8, [])


def record(benchmark, results, **options):
    return {
        "benchmark": benchmark,
        "environment": {"ranks": 4, "torch": "2.13"},
        "options": options,
        "results": results,
    }


class Page(HTMLParser):
    """Finds the elements that are open at the end, texts by element, and links."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.links = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("href", "src", "srcset") if name in found]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [text for kind, text in self.texts if kind == tag]


def test_the_page_shows_figures_and_failures_and_escapes_all(tmp_path):
    nasty = "<script>alert('&amp;')</script>"
    seconds = {"1024": {nasty: [0.002, 0.003, 0.001], "auto": [4e-4] * 6}, "4096": {"auto": [0.25]}}
    (tmp_path / "mean.json").write_text(json.dumps(record("mean", {"seconds": seconds})))
    (tmp_path / "overlap.txt").write_text("lost\n" * 50 + f"\x1b[31m{nasty}\x1b[0m \x00 \x07 died\n")
    program = [nasty, "-m", "benchmarks.overlap"]
    told = results.Suite("quick", ["python", nasty], "/here", "today", [0.1, 0.2, 0.3], {"UCX_TLS": nasty})
    told.outcomes += [
        results.Outcome("mean", ["x", "-m", "benchmarks.mean"], "done", wall_s=3.25),
        results.Outcome("overlap", program, "failed", f"it ended with status 1 {nasty}", 2.0),
        results.Outcome("memory", ["benchmarks.no_such"], "not run", "SIGTERM ended the suite"),
    ]
    told.write(tmp_path)
    assert results.read_suite(tmp_path) == told
    found = results.records(tmp_path, told)
    plots.draw(found["mean"], "mean", tmp_path)
    page.write(tmp_path, told, found)
    shown = Page(tmp_path / "index.html")
    assert shown.open == []
    assert "<script" not in (tmp_path / "index.html").read_text()
    assert nasty in shown.of("th")  # a row of the table
    assert shown.of("h2") == ["Environment", "mean", "overlap", "memory"]
    assert any("1 done, 1 failed, 1 not run, in 5 s" in text for text in shown.of("p"))
    assert [text for text in shown.of("th") if "bytes" in text] == ["1,024 bytes, µs", "4,096 bytes, ms"]
    assert {"2,000", "400", "250"} <= set(shown.of("td"))
    assert {"1,000 to 3,000", "400 to 400"} <= set(shown.of("small"))
    assert any("The time of a mean over the learners" in text for text in shown.of("p"))
    tail = next(text for text in shown.of("pre") if "died" in text)
    assert shlex.quote(nasty) in shown.of("span")
    assert tail.endswith(f"{nasty}  \\x07 died")
    assert tail.count("lost") == 39
    assert f"Failed: it ended with status 1 {nasty}. Its output ends with:" in shown.of("p")
    files = [link for link in shown.links if not link.startswith("#")]
    assert files == ["mean-dark.svg", "mean-light.svg", "mean.json"]
    assert all((tmp_path / name).exists() for name in files)


def test_the_page_has_auto_over_the_best_of_every_arrangement(tmp_path):
    told = results.Suite("nodes", [], "", "", [], {})
    command = ["x", "-m", "benchmarks.cluster", "--slots", "1,1", "--", "x", "-m", "benchmarks.mean"]
    of_runs = {
        "2x1": {"1024": {"hpcavg auto": [3.0], "MPI Allreduce": [2.0]}, "4096": {"hpcavg auto": [1.0]}},
        "4x1": {"4096": {"hpcavg auto": [1.0], "lane Allreduce": [0.8], "MPI Allreduce": [2.0]}},
    }
    for name, seconds in of_runs.items():
        told.outcomes.append(results.Outcome(name, command, "done"))
        written(tmp_path / f"{name}.json", "mean", {"seconds": seconds})
    told.outcomes.append(results.Outcome("overlap", [], "failed"))
    told.write(tmp_path)
    found = results.records(tmp_path, told)
    runs = results.over_best(found)
    assert {(run, size, each.ratio) for run, sizes in runs.items() for size, each in sizes.items()} == {
        ("2x1", "1,024 bytes", 1.5),
        ("4x1", "4,096 bytes", 1.25),
    }
    (axes,) = plots._over_best(runs).axes
    drawn = {each.get_label(): each[0].get_xydata().tolist() for each in axes.containers}
    assert drawn == {"2x1": [[1024, 1.5]], "4x1": [[4096, 1.25]]}
    assert {line.get_label() for line in axes.lines} >= {"1.00", "1.10"}
    plots.draw_over_best(runs, tmp_path)
    page.write(tmp_path, told, found)
    shown = Page(tmp_path / "index.html")
    assert shown.open == []
    assert shown.of("h2") == ["Environment", "auto over best", "2x1", "4x1", "overlap"]
    assert {"1.50", "1.25"} <= set(shown.of("td"))
    assert {"MPI Allreduce", "lane Allreduce"} <= set(shown.of("small"))
    assert sum("The time of a mean over the learners" in text for text in shown.of("p")) == 2  # not of `cluster`
    assert all((tmp_path / name).exists() for name in shown.links if name.endswith(".svg"))


# -- comparing -------------------------------------------------------------------------------------------------------


def written(path, benchmark, values, **options):
    path.write_text(json.dumps(record(benchmark, values, **options)))
    return path


def test_figures_are_compared_by_hand_worked_ratios_and_intervals(tmp_path, monkeypatch, capsys):
    turn = {"blocked": 0.5, "hidden": None, "seconds_to_target": 1.0}
    rates = {
        "sgd": ([100, 100, 100, 100, 100, 100], [50, 50, 50, 50, 50, 50]),  # apart, and more is better: worse
        "k_avg": ([1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11]),  # they touch at 6: the same
        "hier_avg": ([1, 2, 3, 4, 5, 6], [7, 7, 8, 8, 9, 9]),  # 8 / 3.5
        "dasgd": ([1, 2, 3], [9, 9, 9, 9, 9, 9]),  # three values have no interval
    }
    sides = []
    for index, side in enumerate("ab"):
        ways = {
            name: [{**turn, "samples_per_s": rate} for rate in both[index]]
            for name, both in rates.items()
            if name != "dasgd"
        }
        sides.append(read_record(written(tmp_path / f"{side}.json", "training", ways, repeats=6 + index)))
    found = {(each.row, each.column): each for each in compare.comparisons(*({"training": side} for side in sides))}
    assert {row: found[row, "rate"].verdict for row in ("sgd", "k_avg", "hier_avg")} == {
        "sgd": "worse",
        "k_avg": "same",
        "hier_avg": "better",
    }
    assert found["sgd", "rate"].ratio == 0.5
    assert found["hier_avg", "rate"].ratio == pytest.approx(8 / 3.5)
    assert found["k_avg", "of sgd"].ratio == pytest.approx(17 / 3.5)  # 8.5/50 over 3.5/100
    assert found["k_avg", "blocked"].cells()[3:] == ["50.0 (50.0 to 50.0)", "50.0 (50.0 to 50.0)", "1.000", "same"]


@pytest.mark.parametrize(
    ("a", "b", "better", "verdict", "ratio"),
    [
        ([2.0] * 6, [1.0] * 6, "less", "better", 0.5),
        ([2.0] * 6, [1.0] * 6, "more", "worse", 0.5),
        ([2.0] * 3, [1.0] * 6, "less", "unjudged", 0.5),
        ([2.0] * 6, [math.inf] * 6, "less", "worse", None),
        ([math.inf] * 6, [math.inf] * 6, "less", "same", None),
        ([-1.0] * 6, [1.0] * 6, "less", "worse", None),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [8, 9, 10, 11, 12, 13, 14, 15, 16], "less", "worse", 2.4),  # 2 to 8, 9 to 15
    ],
)
def test_a_difference_is_judged_by_its_direction(a, b, better, verdict, ratio):
    found = compare.Comparison("", "", "", figures.Figure((*a,), "s", better), figures.Figure((*b,), "s", better))
    assert (found.verdict, found.ratio) == (verdict, ratio)


def test_two_suites_are_compared_where_both_have_figures(tmp_path, monkeypatch, capsys):
    for name, revision, other in (("A", "1", "memory"), ("B", "2", "own_pace")):
        folder = tmp_path / name
        folder.mkdir()
        told = results.Suite("quick", [], "", "", [], {"UCX_TLS": revision})
        told.outcomes += [results.Outcome(run, []) for run in ("mean", "overlap", other)]
        told.write(folder)
        seconds = {"1024": {"auto": [float(revision)] * 6, f"only {name}": [1.0]}}
        written(folder / "mean.json", "mean", {"seconds": seconds}, bytes=[1024], json=name, repeats=int(revision))
        values = {"memory": {"copies": {"k_avg": {"held": 1.0}}}, "own_pace": {}}[other]
        written(folder / f"{other}.json", other, values)
    folders = [str(tmp_path / name) for name in "AB"]
    monkeypatch.setattr(sys, "argv", ["compare", *folders, "--output", str(tmp_path / "page")])
    compare.main()
    out = capsys.readouterr().out
    assert "Of 1 figure B has 0 better and 1 worse" in out
    shown = Page(tmp_path / "page" / "index.html")
    cells = shown.of("td")
    assert [cell for cell in cells if cell.startswith("2.00")] == ["2.00 (2.00 to 2.00)", "2.000"]
    assert shown.of("span") == ["worse"]
    assert [text for text in shown.of("th") if text in ("mean --repeats", "UCX_TLS", "mean --json")] == [
        "mean --repeats",
        "UCX_TLS",
    ]
    lacking = ["mean: only A: 1,024 bytes", "memory", "mean: only B: 1,024 bytes", "own_pace"]
    assert cells[-4:] == lacking
    for side, line in zip("AABB", lacking, strict=True):
        assert f"only in {side}: {line}" in out


@pytest.mark.parametrize("content", ["[]", '{"benchmark": "mean"}', "no JSON", None])
def test_what_is_no_record_is_refused_in_one_line(tmp_path, content, monkeypatch):
    path = tmp_path / "figures.json"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        results.read_any(path)
    assert str(path) in caught.value.as_option()
    assert caught.value.as_option().isprintable()


@pytest.mark.parametrize(("ranks", "state", "reason"), [(4, "done", ""), (8, "failed", "MPI saw 4 ranks, not 8")])
def test_ranks_that_each_believe_to_be_alone_are_a_failure(tmp_path, ranks, state, reason):
    outcome = results.Outcome("memory", [], "done", ranks=ranks)
    path = written(tmp_path / "memory.json", "memory", {"copies": {"k_avg": {"held": 1.0}}})
    assert suite.take_record(outcome, path) is not None
    assert (outcome.state, outcome.reason.split(";")[0]) == (state, reason)
    outcome = results.Outcome("memory", [], "done", ranks=ranks)
    assert suite.take_record(outcome, tmp_path / "none.json") is None
    assert (outcome.state, outcome.reason) == ("failed", "it has left no figures")
