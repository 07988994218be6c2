"""Docstrings are strict numpydoc: one parameter a line, each a parameter that there is."""

import ast
import re
from pathlib import Path

import pytest

import hpcavg
from hpcavg import algorithms

PACKAGE = Path(hpcavg.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def documented(path):
    """Yield every class and function with a docstring: the node, and the names that its parameters may have."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            makers = [node, *(part for part in node.body if getattr(part, "name", "") == "__init__")]
            names = {argument.arg for maker in makers for argument in ast.walk(maker) if isinstance(argument, ast.arg)}
            names |= {getattr(part.target, "id", "") for part in node.body if isinstance(part, ast.AnnAssign)}
            yield node, names


def faults(docstring, names):
    """Yield what is wrong with the items of Parameters and Attributes, by line."""
    lines = docstring.split("\n")
    section = None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch("-{3,}", following):
            section = line
        elif section in ("Parameters", "Attributes") and line and line[0] not in " -":
            item = re.fullmatch(r"\*{0,2}(\w+)(?: : (.+))?", line)
            if not item:
                yield f"not one name: {line}"
            elif section == "Parameters" and item[1] not in names:
                yield f"no such parameter: {line}"
            elif item[2] and re.search(r"[.;] \*{0,2}\w+ : ", item[2]):
                yield f"two parameters: {line}"


def test_faults_are_found():
    docstring = """What it does.

    Parameters
    ----------
    good : int
        The text.
    short : the text
    a, b : int
    c : one. d : two.
    gone : int
    """
    found = list(faults(re.sub("^    ", "", docstring, flags=re.MULTILINE), {"good", "short", "a", "b", "c", "d"}))
    assert [fault.split(":")[0] for fault in found] == ["not one name", "two parameters", "no such parameter"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parameters_are_described_one_a_line(path):
    found = [
        f"{node.name}: {fault}" for node, names in documented(path) for fault in faults(ast.get_docstring(node), names)
    ]
    assert found == []


def test_the_names_that_users_call_have_an_example():
    public = {name: getattr(hpcavg, name) for name in hpcavg.__all__} | algorithms.ALGORITHMS
    del public["algorithms"]
    assert [name for name, value in public.items() if ">>> " not in value.__doc__] == []
