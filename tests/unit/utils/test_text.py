"""Counts, many names and numbers in short, and values of any kind on one line."""

import pytest

from hpcavg.utils.text import counted, fold_names, fold_numbers, printable


def test_a_noun_has_its_plural():
    assert counted(1, "node") == "1 node"
    assert counted(2, "node") == "2 nodes"
    assert counted(0, "node") == "0 nodes"


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["vm"], "vm"),
        (["node7"], "node7"),
        ([f"node{number:03}" for number in range(1, 65)], "node[001-064]"),
        (["node003", "node001", "node002", "node007"], "node[001-003,007]"),
        (["node8", "node9", "node10", "node12"], "node[8-10,12]"),
        (["node09", "node10", "node011"], "node[09-10,011]"),
        (["h41n09.site", "h41n10.site", "h42n01.site"], "h41n[09-10].site, h42n01.site"),
        (["login", "n1", "n2", "login"], "login, n[1-2]"),
        (["10.0.0.1", "10.0.0.2"], "10.0.0.1, 10.0.0.2"),
        (["gpu1-ib", "gpu2-ib"], "gpu[1-2]-ib"),
        ([], ""),
    ],
)
def test_names_of_nodes_are_folded(names, folded):
    assert fold_names(names) == folded


def test_numbers_are_folded():
    assert fold_numbers([3, 1, 0, 2, 7, 9, 8]) == "0-3, 7-9"
    assert fold_numbers([]) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb\x1b[31m\udcff", "a\\nb\\x1b[31m\\udcff"),
        ("é", "é"),
        (10**6, "1000000"),
        (int("9" * 4000) ** 2, "a int too long to show"),
        ("x" * 201, f"{'x' * 100}...{'x' * 50} (201 characters)"),
        ("x" * 200, "x" * 200),
    ],
    ids=["escapes", "letters", "number", "huge number", "too long", "long"],
)
def test_any_value_is_one_printable_line(value, shown):
    assert printable(value) == shown
