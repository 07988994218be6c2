"""A recipe is run on fewer ranks than it is meant for, scaled down by nothing but options."""

import pytest

from hpcavg.config.sources import tomllib
from tests.process.launch import run

pytestmark = pytest.mark.process


def test_a_recipe_runs_on_two_ranks(tmp_path):
    small = "--task digits --model mlp --steps 2 --group-size 2 --output"
    result = run(2, ["--config", "hier-avg/table1-p16-k2-64", *small.split(), tmp_path / "run"])
    assert result.status == 0, result.err
    assert "warning: the options are meant for 16 learners, not 2\n" in result.out
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (config["k1"], config["k2"], config["steps"], config["intended_learners"]) == (4, 64, 2, 16)
