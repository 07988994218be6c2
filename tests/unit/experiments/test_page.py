"""The page of all verdicts, and its plots."""

import dataclasses
import math
import xml.etree.ElementTree as xml

import pytest

from hpcavg.experiments import page, plots
from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale
from hpcavg.experiments.verdict import Comparison, all_of

PLOT = Plot("curve", "K", "loss", [Line("a", [1, 2], [[1, 2], [3, 4]]), Line("b", [1, 2], [[1, math.nan], [3, 2]])])


def experiment_of(name, paper="k-avg", **options):
    return Experiment(name, paper, "Figure 1", "It holds.", "It did.", "As told.", "All.", *[None] * 3, **options)


@pytest.fixture
def found():
    return {
        "k-avg-one": Finding(all_of(Comparison("gain", [1, 1.1])), ("arm", "gain"), [("a", "1.05")], [PLOT]),
        "k-avg-2.2": Finding(all_of(Comparison("gain", [-0.2, 0.8, 1.8])), ("arm",), [("a",)]),
        "dasgd-one": Finding(all_of(Comparison("gain", [-1, -1.1])), ("arm",), [("a",)]),
    }


@pytest.fixture
def experiments():
    recipes = ("k-avg/figure5",)
    return [
        experiment_of("k-avg-one"),
        experiment_of("k-avg-2.2", recipes=recipes),
        experiment_of("dasgd-one", "dasgd"),
    ]


def test_the_page_has_every_verdict_in_its_index_and_with_its_claim(tmp_path, found, experiments):
    page.write(tmp_path / "papers.md", found, experiments, Scale(seeds=3))
    text = (tmp_path / "papers.md").read_text()
    for name, verdict in {"k-avg-one": "holds", "k-avg-2.2": "undecided here", "dasgd-one": "does not hold"}.items():
        assert f"| [{name}](#{name.replace('.', '')}) | Figure 1 | It holds. | **{verdict}** |" in text
        section = text.partition(f"### {name}\n")[2].partition("###")[0]
        assert f"**Verdict: {verdict}.**" in section
        assert "must be above 0" in section
        assert ("would probably decide it" in section) == (verdict == "undecided here")
    assert text.index("## K-AVG") < text.index("### k-avg-2.2") < text.index("## DaSGD") < text.index("### dasgd-one")
    assert "![loss against K](papers/k-avg-one-curve.svg)" in text
    assert "`k-avg/figure5`" in text


def test_the_page_has_the_number_of_runs_that_diverged(tmp_path, found, experiments):
    results = Results({"a": [{"has_diverged": True}, {"has_diverged": False}], "b": [{"has_diverged": False}, {}]})
    judged = dataclasses.replace(experiments[0], judge=lambda results: found["k-avg-one"]).find(results)
    page.write(tmp_path / "papers.md", {**found, "k-avg-one": judged}, experiments, Scale(seeds=2))
    text = (tmp_path / "papers.md").read_text()
    assert text.count("Runs that diverged") == 1
    assert "Runs that diverged: a: 1 of 2. " in text.partition("### k-avg-one\n")[2].partition("###")[0]


def test_plots_lie_beside_the_page_and_those_of_before_go(tmp_path, found, experiments):
    folder = tmp_path / "papers"
    folder.mkdir()
    for name in ("old.svg", "notes.txt"):
        (folder / name).touch()
    page.write(tmp_path / "papers.md", found, experiments, Scale())
    assert sorted(path.name for path in folder.iterdir()) == ["k-avg-one-curve.svg", "notes.txt"]


def test_the_same_results_give_the_same_bytes(tmp_path, found, experiments):
    for name in ("one", "two"):
        page.write(tmp_path / name / "papers.md", found, experiments, Scale())
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 2


def test_a_plot_is_small_and_keeps_its_texts():
    image = plots.draw(PLOT)
    xml.fromstring(image)
    assert all(f">{text}<".encode() in image for text in ("loss", "K", "a", "b"))
    assert len(image) < 40_000
