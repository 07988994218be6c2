"""What is said about the algorithms is said of all of them, wherever it is shown."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import hpcavg
from hpcavg import algorithms
from hpcavg.algorithms import registry
from hpcavg.cli import parsers
from hpcavg.config.options import OPTIONS

NAMES = list(algorithms.ALGORITHMS)
DOCS = Path(hpcavg.__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_a_text(name):
    description = dataclasses.asdict(registry.DESCRIPTIONS[name])
    assert all(description[field] for field in ("source", "when", "who", "how", "sends", "choose"))


def test_every_option_has_a_meaning_and_every_meaning_an_option():
    assert all(map(registry.option_text, algorithms.all_option_names()))
    for description in registry.DESCRIPTIONS.values():
        assert description.helps.keys() <= description.options.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_is_described_with_all_its_options(name):
    for text in (algorithms.describe(name), algorithms.describe()):
        assert any(line.split()[0] == name.replace("_", "-") for line in text.splitlines())
        for option in algorithms.option_names(name):
            assert f"--{option.replace('_', '-')}" in text


def test_a_description_is_of_the_algorithm_alone():
    assert "--k1 4 --k2 32" in algorithms.describe("hier_avg")
    assert "k-avg" not in algorithms.describe("hier_avg")


def test_every_option_is_one_of_the_configuration():
    assert set(algorithms.all_option_names()) <= OPTIONS.keys()


def test_the_options_of_a_rule_are_those_of_its_constructor():
    for name in NAMES:
        assert tuple(algorithms.build(name, {}).options) == algorithms.option_names(name)


def test_an_options_help_names_its_algorithms_and_their_defaults():
    assert registry.option_help("tau").endswith("[lupa 16, dasgd 4, eamsgd 4]")
    assert registry.option_help("alpha").endswith("[ada-lupa, eamsgd]")


def test_what_two_algorithms_mean_by_an_option_is_told_of_each_and_what_they_share_once():
    assert registry.option_text("alpha").startswith("ada-lupa: growth")
    assert "; eamsgd: elasticity" in registry.option_text("alpha")
    assert registry.option_text("k") == "steps between means"


def test_an_option_has_the_types_of_all_algorithms_that_take_it():
    assert OPTIONS["tau"].kinds == (int, str, type(None))
    assert OPTIONS["k"].kinds == (int, type(None))
    assert OPTIONS["local_steps"].kinds == (tuple[int, ...], str, type(None))
    assert OPTIONS["variant"].kinds == (str, type(None))


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_has_an_example_and_says_what_its_options_are(name):
    text = inspect.getdoc(getattr(algorithms, name))  # Python 3.13 takes the indentation away
    assert f"\n>>> algorithms.{name}(" in text
    assert re.findall(r"^(\w+) : ", text, re.MULTILINE) == list(algorithms.option_names(name))


def test_help_on_the_command_line_tells_all_of_it():
    assert algorithms.describe() in parsers.train_parser().format_help()
    assert parsers.listing(["--algorithm", "help"]) == algorithms.describe()


def test_the_documentation_holds_the_table():
    table = registry.markdown_table()
    assert all(f"| `{name}` |" in table for name in NAMES)
    assert table in (DOCS / "algorithms.md").read_text()
