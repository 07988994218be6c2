"""Experiments at the papers' size: sweep files, and which runs are theirs."""

import dataclasses
import json
import shlex

import pytest
import tomli_w
from mpi4py import MPI

from hpcavg.cli import paper_command, parsers
from hpcavg.experiments import full_size, page, registry
from hpcavg.experiments.experiment import Finding, Scale
from hpcavg.experiments.verdict import Comparison, all_of
from hpcavg.results.summary import Summary
from tests.old_runs import copy_run

ANY = next(iter(registry.experiments().values()))
# Table 1 has K1 = 2, 4, 16 in one file, and the best K of K-AVG in another.
TABLE = dataclasses.replace(
    ANY, name="hier-avg-table-1", recipes=("hier-avg/table1-p16-k2-64", "k-avg/figure1-downpour")
)
ARMS = [
    *(f"hier-avg/table1-p16-k2-64, k1 = {k1}" for k1 in (2, 4, 16)),
    *(f"k-avg/figure1-downpour, intended_learners = {learners}" for learners in (8, 16, 32, 64, 128)),
    "k-avg/figure1-downpour, intended_learners = 128, learning_rate = 0.1",
]


@pytest.fixture
def leave(tmp_path):
    """Return a function that leaves a run of these arguments and accuracy in a folder."""
    known = json.loads((copy_run("d2269b3/dasgd", tmp_path) / "summary.json").read_text())

    def run(name, line, accuracy, **changes):
        config = parsers.parse_train(shlex.split(line))
        folder = tmp_path / "runs" / "sweep" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(tomli_w.dumps(config.as_toml()))
        about: Summary = {
            **known,
            "seed": config.run.seed,
            "num_learners": config.run.intended_learners,
            "test_accuracy": accuracy,
            "completed": True,
            **changes,
        }
        (folder / "summary.json").write_text(json.dumps(about))

    return run


def test_a_recipe_has_an_arm_for_each_variation_and_one_of_its_own_if_none_equals_it():
    assert [arm.name for arm in full_size.arms(TABLE)] == ARMS
    alone = dataclasses.replace(TABLE, recipes=("hier-avg/table1-p64-k2-8", "dasgd/table1-dasgd"))
    names = [arm.name for arm in full_size.arms(alone)]
    assert names[0] == "hier-avg/table1-p64-k2-8"
    assert len(names) == len(set(names)) == 9


def test_a_line_of_a_sweep_file_is_a_run_with_the_papers_learners(tmp_path):
    path, num_lines = full_size.write_sweep(tmp_path, TABLE, seeds=2)
    lines = path.read_text().splitlines()
    assert num_lines == len(lines) == 2 * len(ARMS)
    assert lines[1] == "--config hier-avg/table1-p16-k2-64 --k1 2 --learners 16 --seed 1"
    config = parsers.parse_train(shlex.split(lines[1]))
    assert (config.k1, config.k2, config.seed, config.learners_of_rank(4)) == (2, 64, 1, 4)
    assert lines[-1] == "--config k-avg/figure1-downpour --intended-learners 128 --learning-rate 0.1 --seed 1"
    for line in lines:
        parsers.parse_train(shlex.split(line))


def test_finished_runs_are_found_by_their_options(tmp_path, leave, capfd):
    path, _ = full_size.write_sweep(tmp_path, TABLE, seeds=2)
    lines = path.read_text().splitlines()
    leave("1", f"{lines[0]} --data-dir /data --output x --threads 3", 0.9400)
    leave("2", lines[1], 0.9420)
    leave("3", lines[2].replace("--seed 0", "--seed 7"), 0.5)
    leave("other-rate", f"{lines[4]} --learning-rate 0.2", 0.1)
    leave("other-learners", lines[4], 0.1, num_learners=4)
    leave("stopped", lines[4], 0.1, completed=False)
    leave("damaged", lines[4], 0.1)
    (tmp_path / "runs" / "sweep" / "damaged" / "summary.json").write_text("{")
    found = full_size.collect(tmp_path / "runs", [TABLE, dataclasses.replace(ANY, recipes=())], seeds=2)
    assert list(found) == [TABLE.name]
    finished = found[TABLE.name]
    assert {arm: by_seed for arm, by_seed in finished.accuracies.items() if by_seed} == {
        ARMS[0]: {0: 0.94, 1: 0.942},
        ARMS[1]: {7: 0.5},
    }
    assert finished.rows[:3] == [
        (ARMS[0], "2", "94.10 ± 0.14", "none"),
        (ARMS[1], "1", "50.00", "0, 1"),
        (ARMS[2], "0", "", "0, 1"),
    ]
    assert str(finished) == f"{2 * len(ARMS) - 2} of {2 * len(ARMS)} runs are missing"
    assert "damaged is left out: summary.json is no JSON" in capfd.readouterr().err


def test_the_page_shows_them_beside_the_small_runs(tmp_path, leave):
    finding = {TABLE.name: Finding(all_of(Comparison("gain", [1, 1.1])), ("arm",), [("a",)])}
    page.write(tmp_path / "papers.md", finding, [TABLE], Scale())
    assert "`hier-avg/table1-p16-k2-64`, `k-avg/figure1-downpour`). No run was" in (tmp_path / "papers.md").read_text()
    leave("1", full_size.arms(TABLE)[1].line(0), 0.9411)
    found = full_size.collect(tmp_path / "runs", [TABLE], seeds=1)
    page.write(tmp_path / "papers.md", finding, [TABLE], Scale(), found)
    text = (tmp_path / "papers.md").read_text()
    assert "8 of 9 runs are missing." in text
    assert f"| {ARMS[1]} | 1 | 94.11 | none |" in text


@pytest.mark.parametrize("recipe", ["lupa-sgd/figure2-lupa", "dasgd/figure4", "k-avg/figure5"])
def test_what_a_run_writes_of_a_recipe_equals_what_is_sought(recipe, leave, tmp_path):
    """Options are read from texts, and resolved by the algorithm."""
    experiment = dataclasses.replace(ANY, recipes=(recipe,))
    every = full_size.arms(experiment)
    for number, arm in enumerate(every):
        leave(str(number), arm.line(number), number / 100)
    finished = full_size.collect(tmp_path / "runs", [experiment], seeds=1)[experiment.name]
    assert [list(by_seed) for by_seed in finished.accuracies.values()] == [[number] for number in range(len(every))]


def test_without_a_page_nothing_is_run_here(tmp_path, capsys):
    experiment = next(each for each in registry.experiments().values() if each.recipes)
    where = ["--full", str(tmp_path / "full"), "--cache", str(tmp_path / "cache")]
    options = parsers.parse_paper([experiment.name, *where, "--seeds", "3"])
    paper_command.check(options, num_ranks=1)
    paper_command.run(options, MPI.COMM_SELF)
    lines = (tmp_path / "full" / f"{experiment.name}.txt").read_text().splitlines()
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{experiment.name}: {len(lines)} of {len(lines)} runs are missing"
    assert second.strip().startswith(f"HPCAVG_RUNS={tmp_path / 'full'} HPCAVG_SWEEP=")
    assert second.endswith(f"--array=1-{len(lines)} jobs/sweep.sbatch")
    assert list((tmp_path / "cache").glob("*.json")) == []
