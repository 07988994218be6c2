"""Training on ImageNet from the command line, on images that are made up and prepared here."""

import json

import pytest
from mpi4py import MPI

from hpcavg.data import imagenet
from tests.process.launch import run

pytestmark = pytest.mark.process


def test_two_learners_train_on_shards(tmp_path):
    imagenet.synthesize(tmp_path / "set", 32 / 1_281_167, seed=0)
    imagenet.prepare(tmp_path / "set", tmp_path / "set" / "prepared", 32, MPI.COMM_SELF)
    data = ["--task", "imagenet", "--data-dir", tmp_path / "set", "--crop-size", 28]
    options = ["--batch-size", 8, "--epochs", 1, "--k1", 1, "--k2", 2]
    result = run(2, [*data, *options, "--output", tmp_path / "run"])
    assert (result.status, result.own_lines) == (0, []), result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["samples"], summary["global_averages"]) == (2, 32, 1)
