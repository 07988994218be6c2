"""Runs with several learners in a rank are those of as many ranks with one learner each."""

import h5py
import numpy as np
import pytest

from hpcavg.checkpoints.store import load_model, open_checkpoint
from hpcavg.results.view import read_view
from tests.process.launch import run, trained

pytestmark = pytest.mark.process

# Learners with random layers compute one after the other, and so have the bits of ranks of their own.
TASK = """
from torch import nn
from hpcavg.tasks import Task, digits

def task(config):
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10))
    return Task("dropout", model, digits.load_data)
"""
# No ReLU: where its input is near zero, another rounding gives another derivative.
SMOOTH = """
from torch import nn
from hpcavg.tasks import Task, digits

def task(config):
    images = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(2)
    return Task("smooth", lambda: nn.Sequential(*images, nn.Flatten(), nn.Linear(32, 10)), digits.load_data)
"""
METHOD = "--algorithm hier-avg --k1 2 --k2 6 --group-size 2 --optimizer adam --learning-rate 0.003 --clip-norm 0.5"


def table(folder, name):
    """Return the columns of a table that do not depend on time."""
    return {key: values for key, values in read_view(folder / "metrics", name).items() if not key.endswith("_s")}


def assert_same_tables(folder, other, **tolerances):
    for name in ("step", "averaging", "evaluation"):
        one, two = table(folder, name), table(other, name)
        for key, values in one.items():
            assert values.shape == two[key].shape
            if values.dtype.kind == "f":
                np.testing.assert_allclose(two[key], values, err_msg=f"{name}/{key}", **tolerances)
            else:
                assert (two[key] == values).all(), f"{name}/{key}"


def test_a_run_goes_on_with_other_numbers_of_learners_per_rank(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK)
    arguments = [*METHOD.split(), "--task", f"{path}:task", "--checkpoint-steps", 10, "--partition", "dirichlet"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    alone, _ = trained(whole, 4, [*arguments, "--steps", 30])
    trained(parts, 4, [*arguments, "--steps", 10])
    trained(parts, 2, [*arguments, "--steps", 20, "--learners", 4, "--resume", "auto"])
    together, result = trained(parts, 1, [*arguments, "--steps", 30, "--learners-per-rank", 4, "--resume", "auto"])
    assert "4 learners (4 on each of 1 ranks), 2 local groups" in result.out
    assert "warning: the learners of a rank compute one after the other" in result.out
    assert together["parameters_sha256"] == alone["parameters_sha256"]
    assert_same_tables(whole, parts, rtol=1e-6)
    assert (together["learners_per_rank"], alone["learners_per_rank"], alone["stacked"]) == (4, 1, None)
    assert together["stacked"].startswith("loop: ")
    same = ["num_learners", "group_size", "steps", "samples_per_learner", "global_averages", "local_averages"]
    assert {name: together[name] for name in same} == {name: alone[name] for name in same}
    # Both have a file for each learner, with the same states.
    checkpoints = [open_checkpoint(folder / "checkpoints" / "latest") for folder in (whole, parts)]
    assert [saved.manifest.num_ranks for saved in checkpoints] == [4, 4]
    for learner in range(4):
        one, two = (saved.load(learner, ["model", "random"]) for saved in checkpoints)
        assert all((one["model"][name] == two["model"][name]).all() for name in one["model"])
        assert (one["random"]["torch"] == two["random"]["torch"]).all()
    with h5py.File(parts / "metrics" / "rank-00001-1.h5", "r") as file:
        assert file.attrs["learners"].tolist() == [2, 4]
        assert file.attrs["label_counts"].sum(axis=1).tolist() == [360, 360]


@pytest.mark.parametrize(
    "method",
    [
        "--algorithm hier-avg --k1 2 --k2 6 --group-size 2 --clip-norm 0.5",  # groups in a rank
        "--algorithm pr-sgd-hetero --local-steps 4,3,2,3 --drop-last",  # learners of a rank wait for each other
    ],
)
def test_learners_that_compute_at_once_do_so_to_rounding(method, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(SMOOTH)
    arguments = [*method.split(), "--task", f"{path}:task", "--steps", 24, "--batch-size", 32]
    alone, _ = trained(tmp_path / "alone", 4, arguments)
    together, result = trained(tmp_path / "together", 2, [*arguments, "--learners", 4])
    assert "warning" not in result.out
    assert together["stacked"] == "vmap"
    assert together["samples_per_learner"] == alone["samples_per_learner"]
    one, two = (load_model(tmp_path / name / "checkpoints" / "final.safetensors") for name in ("alone", "together"))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_same_tables(tmp_path / "alone", tmp_path / "together", rtol=1e-4, atol=1e-6)


def test_learners_that_do_not_fit_are_one_line_on_one_rank(tmp_path):
    result = run(2, ["--learners", 3, "--output", tmp_path / "run"])
    assert result.status == 2
    line = "hpcavg: error: --learners 3: must be a multiple of 2, the number of ranks with learners"
    assert [line] == [text for text in result.err.splitlines() if text.startswith("hpcavg")]
    assert not (tmp_path / "run").exists()
