"""Fills in what the pages tell of the program itself; `make pages` runs it.

What stands between ``<!-- from X -->`` and ``<!-- end -->`` in a page is made anew. X is ``help``, for the
text of --help, or a name in the package, with the members to tell of, or ``members`` for all that are public.
"""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
_FILLED = re.compile(r"(<!-- from ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ITEM = re.compile(r"([*\w]+(?:, [*\w]+)*) : ")
_WIDTH = 100


def pages() -> dict[Path, str]:
    """Return what each page should hold."""
    return {path: _FILLED.sub(_fill, path.read_text()) for path in sorted(HERE.glob("*.md"))}


def _fill(match: re.Match[str]) -> str:
    name, *members = match[2].split()
    return f"{match[1]}\n{_help() if name == 'help' else _described(name, members)}\n{match[3]}"


def _help() -> str:
    from hpcavg.cli import parsers

    with mock.patch.dict(os.environ, COLUMNS=str(_WIDTH)):
        return f"```text\n{parsers.train_parser().format_help()}```\n"


# -- names of the package ---------------------------------------------------------------------------------------------


def _described(name: str, members: list[str]) -> str:
    """Return the section of a class, a function or a module, and of its members."""
    described = pkgutil.resolve_name(name)
    if members == ["members"]:
        members = [member for member, value in vars(described).items() if _is_public(described, member, value)]
    own = inspect.getdoc(described) if inspect.ismodule(described) else _signed(name, described)
    parts = [f"## {name}", own or ""]
    for member in members:
        value = getattr(described, member)
        parts += [f"### {name.rpartition('.')[2]}.{member}", _signed(member, getattr(value, "fget", value))]
    return "\n\n".join(parts) + "\n"


def _is_public(owner: Any, name: str, value: Any) -> bool:
    """Return whether a member of a class or module is to be told of; what a module imports is not its own."""
    is_function = inspect.isfunction(value) and (inspect.isclass(owner) or value.__module__ == owner.__name__)
    return (is_function or isinstance(value, property)) and not name.startswith("_")


def _signed(name: str, described: Any) -> str:
    """Return the signature and the docstring of a class or function."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(described))).body
    return f"```python\n{_signature(name, node)}\n```\n\n{_markdown(inspect.getdoc(described) or '')}"


def _signature(name: str, node: Any) -> str:
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        is_property = any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list)
        return f"{name}{returns.replace(' -> ', ': ')}" if is_property else _laid_out(name, _arguments(node), returns)
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    return _laid_out(f"class {name}", _arguments(made[0]) if made else fields, "")


def _arguments(node: ast.FunctionDef) -> list[str]:
    """Return the arguments of a function, without that which is the object itself."""
    given = node.args
    defaults: list[ast.expr | None] = [*[None] * (len(given.args) - len(given.defaults)), *given.defaults]
    found = [_argument(*pair) for pair in zip(given.args, defaults, strict=True) if pair[0].arg != "self"]
    if given.vararg:
        found.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        found.append("*")
    found += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return found + ([f"**{ast.unparse(given.kwarg)}"] if given.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = ast.unparse(argument)
    return text if default is None else f"{text}{' = ' if argument.annotation else '='}{ast.unparse(default)}"


def _laid_out(name: str, arguments: list[str], returns: str) -> str:
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _markdown(docstring: str) -> str:
    """Return a docstring's sections of named items as lists, and all else as it is."""
    lines: list[str] = []
    is_section = False
    for block in docstring.split("\n\n"):
        title, *rest = block.split("\n")
        if rest and re.fullmatch("-{3,}", rest[0]):
            is_section = True
            lines += [f"**{title}**", "", *_items(rest[1:]), ""]
        elif is_section and _ITEM.match(block):
            lines[-1:] = [*_items(block.split("\n")), ""]
        else:
            is_section = False
            lines += [*(_items(block.split("\n")) if _ITEM.match(block) else block.split("\n")), ""]
    return "\n".join(lines).rstrip().replace("``", "`")


def _items(lines: list[str]) -> list[str]:
    """Return lines that begin with names and a colon as items of a list, each with what is indented below it."""
    text = "\n".join(lines)
    # Several short items may share a line: after a full stop, names and a colon begin another.
    text = re.sub(r"(?<=[.?]) (?=[*\w]+(?:, [*\w]+)* : )", "\n", text)
    marked = (
        f"- `{match[1].replace(', ', '`, `')}`: {line[match.end() :]}" if (match := _ITEM.match(line)) else line
        for line in text.split("\n")
    )
    return [re.sub(r"^\s+", "  ", line) for line in marked]


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
