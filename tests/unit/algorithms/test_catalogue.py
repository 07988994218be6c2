"""What is said about the algorithms is said of all of them, wherever it is shown."""

import dataclasses
from pathlib import Path

import pytest

import hpcavg
from hpcavg import algorithms
from hpcavg.algorithms import catalogue
from hpcavg.cli import parsers
from hpcavg.config.options import Config

NAMES = list(algorithms.ALGORITHMS)
DOCS = Path(hpcavg.__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_has_a_text(name):
    text = catalogue.DESCRIPTIONS[name].text
    assert all(dataclasses.astuple(text))


def test_every_option_has_a_meaning_and_every_meaning_an_option():
    assert sorted(catalogue.OPTIONS) == algorithms.all_option_names()
    assert all(catalogue.OPTIONS.values())


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
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(algorithms.all_option_names()) <= fields


def test_the_options_of_a_rule_are_those_of_its_constructor():
    for name in NAMES:
        assert tuple(algorithms.build(name, {}).options) == algorithms.option_names(name)


def test_an_options_help_names_its_algorithms_and_their_defaults():
    assert catalogue.option_help("tau").endswith("[lupa 16, dasgd 4, eamsgd 4]")
    assert catalogue.option_help("alpha").endswith("[ada-lupa, eamsgd]")


def test_help_on_the_command_line_tells_all_of_it():
    assert algorithms.describe() in parsers.train_parser().format_help()


def test_the_documentation_holds_the_table():
    table = catalogue.markdown_table()
    assert all(f"| `{name}` |" in table for name in NAMES)
    assert table in (DOCS / "algorithms.md").read_text()
