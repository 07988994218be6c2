"""Pages and docstrings: what they take from the program is current, links lead somewhere, examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex
import signal
from pathlib import Path

import pytest
import torch

import hpcavg
from hpcavg import Averager, Topology, algorithms
from hpcavg.cli import parsers

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "jobs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# The files that examples read are those of a run like any other.
RUN = ROOT / "tests" / "data" / "d2269b3" / "dasgd"
NEEDS_A_GPU = ("hpcavg.engines.gpu.",)


def name_of(path):
    return str(path.relative_to(ROOT))


def test_what_the_pages_take_from_the_program_is_current():
    wanted = runpy.run_path(str(ROOT / "docs" / "fill.py"))["pages"]()
    assert len(wanted) == len(list((ROOT / "docs").glob("*.md")))
    for path, text in wanted.items():
        assert path.read_text() == text, f"make pages writes {path.name} anew"


# -- links --------------------------------------------------------------------------------------------------------


def anchors(path):
    """Return the names by which a code host and Sphinx both know the headings of a page."""
    headings = re.findall(r"^#+ (.+)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_are_plain_markdown_and_their_links_lead_somewhere(path):
    text = path.read_text()
    assert re.findall(r"^```\{.*|^\.\. \w+::.*", text, re.MULTILINE) == []
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        page = path.parent / target if target else path
        assert "://" in target or page.exists(), target
        assert not anchor or "://" in target or anchor in anchors(page), f"{target}#{anchor}"


def test_every_page_is_in_the_table_of_contents():
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    parts = (ROOT / "docs" / "index.md").read_text().split("## ")[1:]
    assert [part.split()[0] for part in parts] == ["Start", "Use", "Understand", "Contribute"]
    listed = [target for part in parts for target in re.findall(r"^- \[.*?\]\(([^)]+)\)", part, re.MULTILINE)]
    pages = {path.name for path in (ROOT / "docs").glob("*") if path.suffix in (".md", ".rst")} - {"index.md"}
    assert sorted(conf["LINKED"].get(target.removeprefix("../"), target) for target in listed) == sorted(pages)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_files_and_names_of_the_package_that_pages_mention_exist(path):
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL))
    rooms = "|".join(room.name for room in [*ROOT.iterdir(), *(ROOT / "hpcavg").iterdir()] if room.is_dir())
    for text in code:
        if file := re.fullmatch(
            rf"((?:hpcavg|tests|benchmarks|jobs|docs|{rooms})/[\w/.-]+\.(?:py|md|sh|sbatch|lsf|txt|toml))", text
        ):
            assert any((root / file[1]).exists() for root in (ROOT, ROOT / "hpcavg")), text
        elif name := re.match(r"hpcavg(\.\w+)+", text):
            pkgutil.resolve_name(name[0])


# -- Python -------------------------------------------------------------------------------------------------------


def blocks():
    """Yield page, number and text of every block of Python that no comment above it excepts."""
    for path in PAGES:
        found = re.finditer(
            r"(<!-- not run: .+ -->\n\n)?^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL
        )
        for number, match in enumerate(found):
            if not match[1]:
                yield pytest.param(path, number, match[2], id=f"{name_of(path)}-{number}")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """Enter a folder that has what examples name: a run and a file of options."""
    (tmp_path / "runs").mkdir()
    for name in ("NAME", "mine"):
        (tmp_path / "runs" / name).symlink_to(RUN)
    (tmp_path / "recipe.toml").touch()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_signals():
    """Put back the handlers of signals that an example replaces."""
    kinds = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, handlers, strict=True):
        signal.signal(kind, handler)


@pytest.mark.parametrize(("path", "number", "code"), list(blocks()))
@pytest.mark.usefixtures("run_folder", "own_signals")
def test_the_python_of_the_pages_runs(path, number, code):
    model = torch.nn.Linear(2, 2)
    given = {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.functional.cross_entropy,
        "batches": [(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))] * 40,
        "evaluate": lambda model: model(torch.ones(3, 2)),
    }
    if "averager" in code and "Averager(" not in code:
        given["topology"] = Topology()
        given["averager"] = Averager(model, given["optimizer"], algorithms.k_avg(4), given["topology"])
    exec(compile(code, f"{path.name}, block {number}", "exec"), given)
    if "topology" in given:
        given["topology"].free()


def modules_with_examples():
    for path in sorted(Path(hpcavg.__file__).parent.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if ">>> " in path.read_text() and not name.startswith(NEEDS_A_GPU):
            yield name


@pytest.mark.parametrize("name", list(modules_with_examples()))
@pytest.mark.usefixtures("run_folder")
def test_the_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    found = finder.find(module)
    for value in vars(module).values():  # the finder passes over functions with a decorator of another module
        if hasattr(value, "__wrapped__") and (inner := inspect.unwrap(value)).__module__ == name:
            found += finder.find(inner)
    for test in {test.docstring: test for test in found}.values():
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries == Path(module.__file__).read_text().count(">>> ")


# -- commands -----------------------------------------------------------------------------------------------------


def commands():
    """Yield page and words of every command in an indented block. They are parsed, not run: many want a cluster."""
    for path in PAGES:
        for line in re.sub(r"\\\n\s+", "", path.read_text()).splitlines():
            if line.startswith("    ") and re.search(r"python -m|^    make |jobs/\S+\.sbatch", line):
                words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
                yield pytest.param([word for word in words if word != "..."], id=f"{name_of(path)}:{line.strip()[:60]}")


@pytest.mark.parametrize("words", list(commands()))
@pytest.mark.usefixtures("run_folder")
def test_the_commands_of_the_pages_are_understood(words, monkeypatch):
    monkeypatch.setattr("hpcavg.cli.job.write", lambda *_: None)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    for number, word in enumerate(words):
        module = words[number + 1] if word == "-m" else ""
        if module.startswith("benchmarks.") or module.startswith("tests."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
        elif module == "hpcavg":
            understand(words[number + 2 :])
        elif re.fullmatch(r"jobs/\S+", word) and number < 2:
            assert (ROOT / word).exists()
            understand(words[number + 1 :] if word.endswith(".sbatch") else [])


def understand(arguments):
    """Raise `InputError` for arguments of hpcavg that it refuses."""
    command, rest = parsers.split_command(arguments)
    if parsers.wants_help(rest):
        return
    parse = {
        "report": lambda rest: parsers.report_parser().parse_args(rest),
        "job": parsers.write_job,
        "data": parsers.parse_data,
        "paper": parsers.parse_paper,
    }
    parse.get(command, parsers.parse_train)(rest)
