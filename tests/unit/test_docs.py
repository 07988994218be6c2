"""The pages: what they tell of the program is so, they are plain text, and their code runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The files that their code reads are those of a run like any other; the numbers of their blocks.
RUN = ROOT / "tests" / "data" / "d2269b3" / "dasgd"
CODE = {"README.md": [0, 1], "metrics.md": [0], "models.md": [0], "reliability.md": [0]}


def test_what_the_pages_tell_of_the_program_is_so():
    wanted = runpy.run_path(str(ROOT / "docs" / "fill.py"))["pages"]()
    assert len(wanted) == len(PAGES) - 1
    for path, text in wanted.items():
        assert path.read_text() == text, f"make pages writes {path.name} anew"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_plain_markdown_and_their_links_lead_somewhere(path):
    text = path.read_text()
    assert re.findall(r"^```\{.*|^\.\. \w+::.*", text, re.MULTILINE) == []
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize(("name", "number"), [(name, number) for name, numbers in CODE.items() for number in numbers])
def test_the_code_of_the_pages_runs(tmp_path, monkeypatch, name, number):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "NAME").symlink_to(RUN)
    monkeypatch.chdir(tmp_path)
    (page,) = (path for path in PAGES if path.name == name)
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[number]
    model = torch.nn.Linear(2, 2)
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": torch.nn.functional.cross_entropy,
        "batches": [(torch.ones(3, 2), torch.ones(3, dtype=torch.int64))] * 40,
    }
    exec(compile(code, f"{name}, block {number}", "exec"), given)
    if "topology" in given:
        given["topology"].free()
