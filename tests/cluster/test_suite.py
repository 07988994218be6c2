"""The suite of means on emulated nodes, with fewer sizes and repeats."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SUITE = """
from dataclasses import replace
from benchmarks import presets, suite
words = "mean --bytes 1024 4096 --repeats 3 --only 'hpcavg auto' 'MPI Allreduce' 'lane Allreduce'"
presets.PRESETS["nodes"] = replace(presets.PRESETS["nodes"], runs={"2x1-no-limit": words, "2x2-1gbit": words})
suite.run(suite.main)
"""


def test_a_suite_on_emulated_nodes_compares_auto_with_the_best(tmp_path):
    command = [sys.executable, "-c", SUITE, "--preset", "nodes", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, ranks in (("2x1-no-limit", 2), ("2x2-1gbit", 4)):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert (record["environment"]["nodes"], record["environment"]["ranks"]) == (2, ranks)
        for found in record["results"]["seconds"].values():
            assert set(found) == {"hpcavg auto", "MPI Allreduce", "lane Allreduce"}
        assert set(record["results"]["auto_over_best"]) == {"1024", "4096"}
    assert '<h2 id="auto-over-best">' in (tmp_path / "index.html").read_text()
    plot = (tmp_path / "auto-over-best-light.svg").read_text()
    assert "<!-- 2x1-no-limit -->" in plot
    assert "<!-- 2x2-1gbit -->" in plot
