"""Every experiment: its rule can go both ways, its runs can be asked for, its words are complete."""

import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from hpcavg.cli import parsers
from hpcavg.cli.paper_command import check_rule
from hpcavg.config import recipes
from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.experiments import registry
from hpcavg.experiments.experiment import PAPERS, Finding, Scale
from hpcavg.experiments.verdict import Comparison, all_of

EXPERIMENTS = registry.experiments()
every_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)


@every_experiment
def test_the_rule_can_go_both_ways(experiment):
    check_rule(experiment)


@pytest.mark.parametrize("values", [[1.0, 1.1], [-1.0, -1.1], [-1.0, 1.0]], ids=["yes", "no", "undecided"])
def test_a_rule_that_always_says_the_same_is_caught(values):
    finding = Finding(all_of(Comparison("it", values)), ("arm",), [])
    experiment = dataclasses.replace(next(iter(EXPERIMENTS.values())), judge=lambda results: finding)
    with pytest.raises(AssertionError, match=r"says '.*' where it must say '(holds|does not hold)'"):
        check_rule(experiment)


@every_experiment
@pytest.mark.parametrize("is_quick", [False, True], ids=["full", "quick"])
def test_its_runs_can_be_asked_for(experiment, is_quick):
    runs = experiment.runs(Scale(seeds=2, is_quick=is_quick))
    assert len(runs) >= 1
    assert {len(of_arm) for of_arm in runs.values()} == {2}
    for run in (run for of_arm in runs.values() for run in of_arm):
        module, _, name = run.function.partition(":")
        assert callable(getattr(import_module(f"hpcavg.experiments.functions.{module}"), name))
        assert json.loads(json.dumps(run.options)) == run.options
        assert np.isfinite(run.work)
        assert run.work > 0
        if run.function == "training:train":
            Config(**run.options)
    for one, other in runs.values():
        assert one.key != other.key, "two seeds are the same run"


@every_experiment
def test_its_words_are_complete(experiment):
    assert re.fullmatch(rf"{experiment.paper}(-[a-z0-9.]+)+", experiment.name)
    for text in (experiment.claim, experiment.saw, experiment.rule, experiment.scaling):
        assert text.endswith((".", ")", '."')), text
    assert set(experiment.recipes) <= set(recipes.names())


def test_names_are_listed_once_and_papers_stand_for_all_of_theirs():
    assert len(EXPERIMENTS) == sum(
        len(import_module(f"hpcavg.experiments.{paper.replace('-', '_')}").EXPERIMENTS) for paper in PAPERS
    )
    first = next(iter(EXPERIMENTS.values()))
    of_paper = [each for each in EXPERIMENTS.values() if each.paper == first.paper]
    assert registry.chosen([]) == list(EXPERIMENTS.values())
    assert registry.chosen([first.name]) == [first]
    assert registry.chosen([first.name, first.paper, first.name]) == of_paper
    assert registry.describe().count("\n") == len(EXPERIMENTS) - 1


def test_the_list_needs_neither_torch_nor_mpi():
    program = (
        "import atexit, sys; atexit.register(lambda: print(*{'torch', 'mpi4py.MPI', 'scipy'} & set(sys.modules)));"
        "from hpcavg.cli.main import main; main(['paper', '--list'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["k-agv"], "k-agv: neither an experiment nor a paper; near it: k-avg"),
        (["!"], "!: neither an experiment nor a paper; paper --list prints them"),
        (["--seeds", "1"], "--seeds 1: must be an integer of at least 2 and at most 1000"),
        (["--seeds", "many"], "--seeds many: must be an integer of at least 2"),
        (["--ranks-per-run", "0"], "--ranks-per-run 0: must be an integer of at least 1"),
        (["--page", "papers.txt"], "--page papers.txt: must be a name that ends with .md"),
        (["--fast"], "--fast: no such option; near it: --"),
    ],
)
def test_bad_input_is_one_line(arguments, line):
    with pytest.raises(InputError) as raised:
        parsers.parse_paper(arguments)
    assert raised.value.as_option().startswith(line)
    assert "\n" not in raised.value.as_option()
